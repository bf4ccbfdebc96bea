"""Draws a schedule over time, one row a rank: as text for a terminal, as SVG for a page. Pure.

Both show the same: a box is an action, with its kind and its micro-batch, and what is idle between a rank's first and last
action is its bubble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import median
from string import ascii_lowercase
from types import MappingProxyType

from megatron.pipeline.schedules.schedule import Action, Op, Schedule
from megatron.pipeline.schedules.simulate import Timeline

OP_NAMES: Mapping[Op, str] = MappingProxyType(
    {
        Op.F: "forward",
        Op.B: "backward",
        Op.I: "input gradient",
        Op.W: "weight gradient",
    }
)
MIN_WIDTH = 40  # columns of the smallest text drawing
MAX_ROWS = 32  # ranks in a text drawing; of more, the first and the last
TEXT_LEFT = 9  # columns of "rank 000 "


def draw_text(schedule: Schedule, timeline: Timeline, width: int = 120) -> str:
    """Return the timeline as text in at most `width` columns, without a newline at the end.

    F3 is the forward of micro-batch 3, and blanks behind it are the rest of its time; dots are bubble. Where ranks have several
    chunks, a letter tells them apart: F3a on the first, F3b on the second. Where boxes are too narrow for that, F, B, I and W
    stand alone, in lower case on every second chunk. What does not fit even so is cut off at the right, and a line says so.

    Args:
        schedule: what is drawn.
        timeline: its times.
        width: columns, at least 40.

    Raises:
        ValueError: the width is less.
    """
    if width < MIN_WIDTH:
        raise ValueError(f"a drawing needs at least {MIN_WIDTH} columns, not {width}")
    columns = width - TEXT_LEFT
    scale = _text_scale(schedule, timeline, columns)
    shown = list(range(schedule.ranks))
    if schedule.ranks > MAX_ROWS:
        del shown[MAX_ROWS // 2 : -MAX_ROWS // 2]
    lines = [f"{_describe_schedule(schedule)}; {_describe_timeline(timeline)}"]
    for above, rank in pairwise([-1, *shown]):
        if rank > above + 1:
            lines.append(f"...      {rank - above - 1} more ranks")
        row = "".join(_text_row(schedule, timeline, rank, scale))
        lines.append(f"{f'rank {rank}':{TEXT_LEFT}}{row[:columns]}".rstrip())
    if timeline.makespan * scale > columns + 0.5:
        lines.append(f"cut at time {columns / scale:.4g} of {timeline.makespan:.4g}; a wider drawing or the SVG shows the rest")
    ops = sorted({action.op for action in schedule.actions}, key=list(Op).index)
    lines.append("; ".join([*(f"{op.value} {OP_NAMES[op]}" for op in ops), "dots: bubble"]))
    return "\n".join(lines)


def _text_scale(schedule: Schedule, timeline: Timeline, columns: int) -> float:
    """Columns for a unit of time: enough for every label; else what fits `columns`; but a column for most actions."""
    durations = [d for d in (timeline.end[a] - timeline.start[a] for a in timeline.start) if d > 0]
    if not durations:
        return 1.0
    shortest, typical = min(durations), median(durations)
    roomy = (max(len(_label(schedule, a)) for a in schedule.actions) + 1) / shortest
    scale = min(roomy, max(columns / timeline.makespan, 1 / typical))
    # Whole columns for the shortest action keep equal actions equal.
    return math.floor(scale * shortest) / shortest if scale * shortest >= 1 else scale


def _text_row(schedule: Schedule, timeline: Timeline, rank: int, scale: float) -> list[str]:
    """One character a column, from the first start of any rank to this rank's last end."""
    row: list[str] = []
    for action in schedule.programs[rank]:
        left, right = (round((time - timeline.origin) * scale) for time in (timeline.start[action], timeline.end[action]))
        row += (" " if not row else ".") * (left - len(row))
        label = _label(schedule, action)
        if len(label) >= right - left:
            label = action.op.value if schedule.chunk[action.stage] % 2 == 0 else action.op.value.lower()
        row += label.ljust(right - left)[: right - left]
    return row


def _label(schedule: Schedule, action: Action) -> str:
    """F3, or where ranks have several chunks F3a, F3b, ...; behind z it starts again with a."""
    chunk = ascii_lowercase[schedule.chunk[action.stage] % 26] if schedule.stages > schedule.ranks else ""
    return f"{action.op.value}{action.micro_batch}{chunk}"


def _describe_schedule(schedule: Schedule) -> str:
    chunks = schedule.stages // schedule.ranks
    words = ["1 rank" if schedule.ranks == 1 else f"{schedule.ranks} ranks"]
    if chunks > 1:
        words.append(f"{chunks} chunks each")
    words.append("1 micro-batch" if schedule.micro_batches == 1 else f"{schedule.micro_batches} micro-batches")
    return f"{schedule.name}: {', '.join(words)}"


def _describe_timeline(timeline: Timeline) -> str:
    peaks = timeline.peak_activations
    listed = ", ".join(map(str, peaks)) if len(peaks) <= 8 and len(set(peaks)) > 1 else str(max(peaks))
    return f"makespan {timeline.makespan:.4g}, bubble {timeline.bubble_rate:.1%}, peak activations {listed}"


@dataclass(frozen=True)
class Panel:
    """One timeline of a drawing, under its title."""

    title: str
    schedule: Schedule
    timeline: Timeline


# Lightest and darkest shade of each kind: the first chunk's and the last chunk's.
SHADES: Mapping[Op, tuple[str, str]] = MappingProxyType(
    {
        Op.F: ("#9cc4ee", "#23558f"),
        Op.B: ("#f2b279", "#a44a12"),
        Op.I: ("#84d3c0", "#176d5d"),
        Op.W: ("#f3d77a", "#927008"),
    }
)
INK, FAINT, BUBBLE, PAPER = "#1f2933", "#66727f", "#e4e8ec", "white"
LEFT, RIGHT, ROW, GAP, HEAD, FOOT = 64, 20, 24, 3, 46, 50  # pixels: margins, height of a row and between rows, panel's title
BOX, MIN_PLOT, MAX_PLOT = 20, 640, 2400  # pixels: a typical box wants 20; the plot is 640 to 2400 wide
DIGIT = 6.6  # pixels of a figure at the boxes' font size


def draw_svg(panels: Sequence[Panel]) -> str:
    """Return the panels under one another on one scale of time, each from its own first start, as the text of an SVG file.

    Boxes are coloured by what they are, darker for later chunks, and carry their micro-batch where they are wide enough; a box
    under the pointer says what it is. Grey is bubble. ValueError without panels.
    """
    if not panels:
        raise ValueError("there is nothing to draw: give at least one panel")
    longest = max(panel.timeline.makespan for panel in panels) or 1.0
    wanted = max(BOX * longest / _median_duration(panel.timeline) for panel in panels)
    plot = min(max(wanted, MIN_PLOT), MAX_PLOT)
    scale = plot / longest
    body, y = [], 14.0
    for panel in panels:
        body += _panel(panel, y, scale)
        y += HEAD + panel.schedule.ranks * (ROW + GAP) + 10
    body += _axis(y, longest, scale)
    body += _legend(y + 40, panels)
    width, height = LEFT + plot + RIGHT, y + FOOT + 14
    title = escape("; ".join(panel.title for panel in panels))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}" role="img">',
            f"<title>{title}</title>",
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="{PAPER}"/>',
            *body,
            "</svg>\n",
        ]
    )


def _median_duration(timeline: Timeline) -> float:
    durations = [d for d in (timeline.end[a] - timeline.start[a] for a in timeline.start) if d > 0]
    return median(durations) if durations else 1.0


def _panel(panel: Panel, y: float, scale: float) -> list[str]:
    schedule, timeline = panel.schedule, panel.timeline
    caption = f"{_describe_schedule(schedule)}; {_describe_timeline(timeline)}"
    out = [
        _svg_text(LEFT, y + 12, panel.title, size=15),
        _svg_text(LEFT, y + 31, caption, color=FAINT),
    ]
    last_chunk = max(schedule.chunk)
    for rank, program in enumerate(schedule.programs):
        top = y + HEAD + rank * (ROW + GAP)
        out.append(_svg_text(LEFT - 10, top + 16, f"rank {rank}", color=FAINT, anchor="end"))
        if not program:
            continue
        first = min(timeline.start[action] for action in program) - timeline.origin
        out.append(_svg_rect(LEFT + first * scale, top, timeline.span[rank] * scale, BUBBLE, "bubble"))
        for action in program:
            chunk = schedule.chunk[action.stage]
            depth = chunk / last_chunk if last_chunk else 0.0
            start = timeline.start[action] - timeline.origin
            duration = timeline.end[action] - timeline.start[action]
            x, width = LEFT + start * scale, duration * scale
            when = (
                f"{OP_NAMES[action.op]}, micro-batch {action.micro_batch}, stage {action.stage}: {start:.4g} + {duration:.4g}"
            )
            out.append(_svg_rect(x, top, width, _shade(action.op, depth), action.op.value, when))
            text = str(action.micro_batch)
            if width >= len(text) * DIGIT + 3:
                color = PAPER if depth > 0.5 else INK
                out.append(_svg_text(x + width / 2, top + 16, text, size=11, color=color, anchor="middle"))
    return out


def _axis(y: float, longest: float, scale: float) -> list[str]:
    """A line with about eight round times."""
    rough = longest / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    out = [f'<path d="M{LEFT} {y:.1f}H{LEFT + longest * scale:.1f}" stroke="{FAINT}" fill="none"/>']
    for i in range(math.floor(longest / step + 1e-9) + 1):
        x = LEFT + i * step * scale
        out.append(f'<path d="M{x:.1f} {y:.1f}v4" stroke="{FAINT}" fill="none"/>')
        out.append(_svg_text(x, y + 17, f"{i * step:.6g}", size=11, color=FAINT, anchor="middle"))
    out.append(_svg_text(LEFT - 10, y + 17, "time", size=11, color=FAINT, anchor="end"))
    return out


def _legend(y: float, panels: Sequence[Panel]) -> list[str]:
    """One key for each kind of action that is drawn, in its shades, and one for the bubble."""
    used = {action.op for panel in panels for action in panel.schedule.actions}
    shades = 2 if any(max(panel.schedule.chunk) for panel in panels) else 1
    keys = [(OP_NAMES[op], [_shade(op, depth) for depth in range(shades)]) for op in Op if op in used]
    keys.append(("bubble", [BUBBLE]))
    out, x = [], float(LEFT)
    for text, colors in keys:
        for color in colors:
            out.append(f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" rx="2" fill="{color}"/>')
            x += 13
        out.append(_svg_text(x + 5, y, text, size=11))
        x += 5 + len(text) * 5.9 + 18
    if shades > 1:
        out.append(_svg_text(x, y, "darker: later chunk", size=11, color=FAINT))
    return out


def _shade(op: Op, depth: float) -> str:
    """Return the shade of a kind of action: depth 0 is the lightest, 1 the darkest."""
    light, dark = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in SHADES[op])
    return "#" + "".join(f"{round(a + (b - a) * depth):02x}" for a, b in zip(light, dark, strict=True))


def _svg_rect(x: float, y: float, width: float, color: str, kind: str, title: str = "") -> str:
    hover = f"<title>{escape(title)}</title></rect>" if title else "</rect>"
    # A hair of the paper between neighbours; never so much that a short action vanishes.
    seam = min(0.8, width / 4) if title else 0.0
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:.1f}" width="{width - seam:.2f}" height="{ROW}" fill="{color}">{hover}'


def _svg_text(x: float, y: float, text: str, *, size: int = 12, color: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
