"""Drawings: the text column by column, the SVG parsed and its boxes counted and measured."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from megatron.pipeline.schedules.draw import Panel, draw_svg, draw_text
from megatron.pipeline.schedules.schedule import SCHEDULES, make_schedule
from megatron.pipeline.schedules.simulate import Costs, measured_timeline, simulate

SVG = "{http://www.w3.org/2000/svg}"


def draw_lines(
    name: str, ranks: int, micro_batches: int, width: int = 120, costs: Costs | None = None, chunks: int | None = None
):
    schedule = make_schedule(name, ranks, micro_batches, chunks)
    return draw_text(schedule, simulate(schedule, costs or Costs()), width).splitlines()


def build_panel(name: str, ranks: int, micro_batches: int, costs: Costs | None = None) -> Panel:
    schedule = make_schedule(name, ranks, micro_batches)
    return Panel(f"{name} <predicted> & more", schedule, simulate(schedule, costs or Costs()))


def action_rectangles(svg: str) -> list[ElementTree.Element]:
    """Rectangles that are actions."""
    return [rect for rect in ElementTree.fromstring(svg).iter(SVG + "rect") if rect.get("class") in {"F", "B", "I", "W"}]


def test_text_of_1f1b():
    assert draw_lines("1f1b", 3, 3, 80) == [
        "1f1b: 3 ranks, 3 micro-batches; makespan 15, bubble 40.0%, peak activations 3, 2, 1",
        "rank 0   F0 F1 F2 ............B0    ...B1    ...B2",
        "rank 1      F0 F1 ......B0    F2 B1    ...B2",
        "rank 2         F0 B0    F1 B1    F2 B2",
        "F forward; B backward; dots: bubble",
    ]


def test_text_tells_chunks_apart():
    lines = draw_lines("zb-v", 2, 3, 100)
    assert lines[1] == "rank 0   F0a F1a F2a F0b I0b W0b F1b I1b W1b I0a W0a F2b I2b W2b I1a W1a I2a W2a"
    narrow = draw_lines("zb-v", 2, 3, 50)
    assert narrow[1] == "rank 0   F F F f i w f i w I W f i w I W I W"


def test_text_shows_times_to_scale():
    """Four units of waiting are twelve dots; before the first action of a rank is nothing."""
    lines = draw_lines("1f1b", 2, 1, 80, Costs(1, 1, 0, 1))
    assert [line[9:] for line in lines[1:3]] == ["F0 ............B0", "      F0 B0"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("width", [40, 57, 120])
def test_text_stays_within_its_width(name, width):
    lines = draw_lines(name, 4, 9, width, Costs(1.37, 1.21, 0.4, 0.1))
    assert max(len(line) for line in lines[1:5]) <= width


def test_text_that_is_cut_says_so():
    lines = draw_lines("1f1b", 4, 200, 80)
    assert "cut at time " in lines[-2]
    assert not any("cut at" in line for line in draw_lines("1f1b", 4, 8, 120))
    deep = draw_lines("1f1b", 40, 4, 80)
    assert "...      8 more ranks" in deep
    assert sum(line.startswith("rank ") for line in deep) == 32


def test_text_of_a_measurement_starts_at_its_first_action():
    schedule = make_schedule("1f1b", 3, 3)
    made = simulate(schedule, Costs())
    moved = measured_timeline(schedule, {a: t + 64 for a, t in made.start.items()}, {a: t + 64 for a, t in made.end.items()})
    assert draw_text(schedule, moved, 80) == draw_text(schedule, made, 80)


def test_too_narrow_is_refused():
    with pytest.raises(ValueError, match="at least 40 columns, not 39"):
        draw_lines("1f1b", 2, 2, 39)


@pytest.mark.parametrize("name", SCHEDULES)
def test_svg_has_a_box_for_every_action(name):
    one = build_panel(name, 3, 5)
    found = action_rectangles(draw_svg([one, one]))
    wanted = Counter(action.op.value for action in one.schedule.actions)
    assert Counter(rect.get("class") for rect in found) == {op: 2 * count for op, count in wanted.items()}


def test_svg_panels_share_a_scale_of_time():
    """A prediction beside a measurement that took twice as long: boxes start at the same place and are twice as wide."""
    fast, slow = build_panel("1f1b", 2, 4), build_panel("1f1b", 2, 4, Costs(2, 2, 2))
    late = measured_timeline(
        slow.schedule,
        {a: t + 500 for a, t in slow.timeline.start.items()},
        {a: t + 500 for a, t in slow.timeline.end.items()},
    )
    found = action_rectangles(draw_svg([fast, Panel("measured", slow.schedule, late)]))
    half = len(found) // 2
    assert found[0].get("x") == found[half].get("x")
    seam = 0.8
    for first, second in zip(found[:half], found[half:], strict=True):
        widths = [float(rect.get("width", "")) + seam for rect in (first, second)]
        assert widths[1] == pytest.approx(2 * widths[0], abs=0.05)


def test_svg_boxes_of_a_rank_do_not_overlap():
    svg = draw_svg([build_panel("zb-h2", 4, 9, Costs(1.8, 1.7, 0.9, 0.1))])
    rows: dict[str, list[tuple[float, float]]] = {}
    for rect in action_rectangles(svg):
        x = float(rect.get("x", ""))
        rows.setdefault(rect.get("y", ""), []).append((x, x + float(rect.get("width", ""))))
    assert len(rows) == 4
    for row in rows.values():
        row.sort()
        assert all(right <= left + 0.02 for (_, right), (left, _) in pairwise(row))


def test_svg_says_what_it_shows():
    root = ElementTree.fromstring(draw_svg([build_panel("zb-v", 2, 4), build_panel("1f1b", 2, 4)]))
    words = [element.text or "" for element in root.iter(SVG + "text")]
    assert "zb-v <predicted> & more" in words
    assert "zb-v: 2 ranks, 2 chunks each, 4 micro-batches; makespan 25, bubble 0.0%, peak activations 4" in words
    assert "1f1b: 2 ranks, 4 micro-batches; makespan 15, bubble 20.0%, peak activations 2, 1" in words
    assert {"forward", "backward", "input gradient", "weight gradient", "bubble", "darker: later chunk"} <= set(words)
    assert words.count("3") >= 4 * 3 + 2 * 2  # micro-batch 3 in its boxes


def test_svg_later_chunks_are_darker():
    colors: dict[str, set[str]] = {}
    for rect in action_rectangles(draw_svg([build_panel("interleaved", 2, 4)])):
        colors.setdefault(rect.get("class", ""), set()).add(rect.get("fill", ""))
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for shades in colors.values() for color in shades)
    assert {op: len(shades) for op, shades in colors.items()} == {"F": 2, "B": 2}
    first, *_ = action_rectangles(draw_svg([build_panel("1f1b", 2, 4)]))
    assert first.get("fill") in colors["F"]


def test_svg_is_as_wide_as_it_must_be():
    """Boxes stay inside, whichever panel is the longest; a small drawing is small, a very large one stays printable."""

    def width(*panels: Panel) -> float:
        svg = draw_svg(panels)
        wide = float(ElementTree.fromstring(svg).get("width", ""))
        assert max(float(rect.get("x", "")) + float(rect.get("width", "")) for rect in action_rectangles(svg)) < wide
        return wide

    small, large = build_panel("1f1b", 2, 4), build_panel("1f1b", 8, 300)
    assert width(small) < 800
    assert 2000 < width(large) < 2600
    assert width(small, large) == width(large, small) == width(large)


def test_svg_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one panel"):
        draw_svg([])
    assert action_rectangles(draw_svg([build_panel("1f1b", 1, 1, Costs(0, 0, 0))]))
