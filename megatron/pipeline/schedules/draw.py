"""Draw the timeline of a schedule, with a row for each rank: as text for a terminal, or as SVG. Pure.

A box is an action, with its kind and its micro-batch. The idle time between a rank's first and last action is its bubble.
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
MAX_ROWS = 32  # rows of a text drawing; with more ranks, only the first and last 16 are shown
TEXT_LEFT = 9  # columns of "rank 000 "


def draw_text(schedule: Schedule, timeline: Timeline, width: int = 120) -> str:
    """Return the timeline as text in at most `width` columns, without a newline at the end.

    F3 is the forward of micro-batch 3, and the blanks after it are the rest of its time; dots are bubble. If ranks have several
    chunks, a letter distinguishes them: F3a on the first, F3b on the second. A box that is too narrow for its label only shows
    F, B, I or W, in lower case for every second chunk. A drawing that is still too wide is cut off at the right, with a note.

    Args:
        schedule: the schedule to draw.
        timeline: the times of its actions.
        width: number of columns, at least 40.

    Raises:
        ValueError: the width is below 40.
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
    """Return the columns per unit of time: enough for every label if that fits in `columns`, else the most that fit.

    A typical action gets at least one column, even if the drawing is then too wide.
    """
    durations = [d for d in (timeline.end[a] - timeline.start[a] for a in timeline.start) if d > 0]
    if not durations:
        return 1.0
    shortest, typical = min(durations), median(durations)
    scale_for_labels = (max(len(_label(schedule, a)) for a in schedule.actions) + 1) / shortest
    scale = min(scale_for_labels, max(columns / timeline.makespan, 1 / typical))
    # An integer number of columns for the shortest action makes equal actions equally wide.
    return math.floor(scale * shortest) / shortest if scale * shortest >= 1 else scale


def _text_row(schedule: Schedule, timeline: Timeline, rank: int, scale: float) -> list[str]:
    """Return the characters of a row, one for each column, from the first start on any rank to this rank's last end."""
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
    """Return the label of an action: F3, or F3a, F3b, ... if ranks have several chunks; after z the letters repeat."""
    chunk = ascii_lowercase[schedule.chunk[action.stage] % 26] if schedule.stages > schedule.ranks else ""
    return f"{action.op.value}{action.micro_batch}{chunk}"


def _describe_schedule(schedule: Schedule) -> str:
    chunks = schedule.stages // schedule.ranks
    counts = ["1 rank" if schedule.ranks == 1 else f"{schedule.ranks} ranks"]
    if chunks > 1:
        counts.append(f"{chunks} chunks each")
    counts.append("1 micro-batch" if schedule.micro_batches == 1 else f"{schedule.micro_batches} micro-batches")
    return f"{schedule.name}: {', '.join(counts)}"


def _describe_timeline(timeline: Timeline) -> str:
    peaks = timeline.peak_activations
    listed = ", ".join(map(str, peaks)) if len(peaks) <= 8 and len(set(peaks)) > 1 else str(max(peaks))
    return f"makespan {timeline.makespan:.4g}, bubble {timeline.bubble_rate:.1%}, peak activations {listed}"


@dataclass(frozen=True)
class Panel:
    """One titled timeline of an SVG drawing."""

    title: str
    schedule: Schedule
    timeline: Timeline


# Shades of the first chunk and of the last chunk, for each kind of action.
SHADES: Mapping[Op, tuple[str, str]] = MappingProxyType(
    {
        Op.F: ("#9cc4ee", "#23558f"),
        Op.B: ("#f2b279", "#a44a12"),
        Op.I: ("#84d3c0", "#176d5d"),
        Op.W: ("#f3d77a", "#927008"),
    }
)
INK, FAINT, BUBBLE, PAPER = "#1f2933", "#66727f", "#e4e8ec", "white"
# In pixels: left and right margin, height of a row, gap between rows, height of a panel's title, space below the last panel.
LEFT, RIGHT, ROW, GAP, HEAD, FOOT = 64, 20, 24, 3, 46, 50
BOX, MIN_PLOT, MAX_PLOT = 20, 640, 2400  # pixels: desired width of a typical box; minimum and maximum width of the plot
DIGIT = 6.6  # pixels: width of a digit in a box


def draw_svg(panels: Sequence[Panel]) -> str:
    """Return the text of an SVG file with the panels below one another, on the same time scale, each from its own first start.

    The colour of a box is its kind of action, darker for later chunks. Boxes that are wide enough show their micro-batch, and
    every box has a tooltip. Grey is bubble. ValueError without panels.
    """
    if not panels:
        raise ValueError("there is nothing to draw: give at least one panel")
    longest = max(panel.timeline.makespan for panel in panels) or 1.0
    desired = max(BOX * longest / _median_duration(panel.timeline) for panel in panels)
    plot = min(max(desired, MIN_PLOT), MAX_PLOT)
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
            tooltip = (
                f"{OP_NAMES[action.op]}, micro-batch {action.micro_batch}, stage {action.stage}: {start:.4g} + {duration:.4g}"
            )
            out.append(_svg_rect(x, top, width, _shade(action.op, depth), action.op.value, tooltip))
            text = str(action.micro_batch)
            if width >= len(text) * DIGIT + 3:
                color = PAPER if depth > 0.5 else INK
                out.append(_svg_text(x + width / 2, top + 16, text, size=11, color=color, anchor="middle"))
    return out


def _axis(y: float, longest: float, scale: float) -> list[str]:
    """Return the time axis, with about eight ticks at round times."""
    exact_step = longest / 8
    power = 10.0 ** math.floor(math.log10(exact_step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= exact_step * 0.999)
    out = [f'<path d="M{LEFT} {y:.1f}H{LEFT + longest * scale:.1f}" stroke="{FAINT}" fill="none"/>']
    for i in range(math.floor(longest / step + 1e-9) + 1):
        x = LEFT + i * step * scale
        out.append(f'<path d="M{x:.1f} {y:.1f}v4" stroke="{FAINT}" fill="none"/>')
        out.append(_svg_text(x, y + 17, f"{i * step:.6g}", size=11, color=FAINT, anchor="middle"))
    out.append(_svg_text(LEFT - 10, y + 17, "time", size=11, color=FAINT, anchor="end"))
    return out


def _legend(y: float, panels: Sequence[Panel]) -> list[str]:
    """Return the legend: an entry with its shades for each kind of action that is drawn, and one for the bubble."""
    used = {action.op for panel in panels for action in panel.schedule.actions}
    shades = 2 if any(max(panel.schedule.chunk) for panel in panels) else 1
    entries = [(OP_NAMES[op], [_shade(op, depth) for depth in range(shades)]) for op in Op if op in used]
    entries.append(("bubble", [BUBBLE]))
    out, x = [], float(LEFT)
    for text, colors in entries:
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
    # A thin gap between neighbouring boxes, but at most a quarter of a narrow box.
    gap = min(0.8, width / 4) if title else 0.0
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:.1f}" width="{width - gap:.2f}" height="{ROW}" fill="{color}">{hover}'


def _svg_text(x: float, y: float, text: str, *, size: int = 12, color: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
