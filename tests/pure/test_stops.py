"""Stop texts found by an automaton: as a search of the whole text would find them, in linear time."""

from __future__ import annotations

import random

from megatron.serving.stops import StopScan, StopTexts


def test_a_scan_finds_what_a_search_finds() -> None:
    chance = random.Random(1)

    def word(least: int, most: int) -> str:
        return "".join(chance.choices("ab\u20ac", k=chance.randint(least, most)))

    for _ in range(2000):
        stops = [word(1, 5) for _ in range(chance.randint(1, 5))]
        scan, text = StopScan(StopTexts(stops)), ""
        for _ in range(4):
            text += word(0, 6)
            scan.read(text)
            places = [at for stop in stops if (at := text.find(stop)) >= 0]
            assert scan.found == min(places, default=None)
            assert scan.num_pending == max(n for stop in stops for n in range(len(stop) + 1) if text.endswith(stop[:n]))


def test_a_text_that_has_changed_is_read_again() -> None:
    scan = StopScan(StopTexts(["end"]))
    scan.read("the en")
    assert scan.num_pending == 2
    scan.read("the exen")
    assert scan.num_pending == 2 and scan.found is None
    scan.read("the end")
    assert scan.found == 4


def test_only_what_is_new_is_looked_at() -> None:
    """A thousand long stop texts that all begin alike, and a text of their beginnings: a step for each character, no more."""

    class Counted(StopTexts):
        steps = 0

        def step(self, state: int, character: str) -> int:
            self.steps += 1
            return super().step(state, character)

    stops = Counted(["a" * 50 + f"{i:04}" for i in range(1000)])
    scan, stops.steps = StopScan(stops), 0
    for length in range(1, 1001):
        scan.read("a" * length)
    assert stops.steps == 1000 and scan.found is None and scan.num_pending == 50
