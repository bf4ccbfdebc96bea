"""Find stop texts in a growing text, in time linear in its length, for any number of stop texts; pure.

Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (1975).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopTexts:
    """An automaton: its state after a text is the longest suffix of it that is a prefix of a stop text; state 0 is empty.

    Attributes:
        depth: number of characters of each state's prefix.
        longest: length of the longest stop text that the state's prefix ends with; 0 for none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # the failure link: the state of the longest proper suffix
        self.depth, self.longest = [0], [0]
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._shorter.append(0)
                self.depth.append(self.depth[state] + 1)
                self.longest.append(0)
            state = following
        self.longest[state] = self.depth[state]

    def _link(self) -> None:
        """Set the failure links, visiting the states by depth, so that those of shorter prefixes are known."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                self._shorter[following] = self.step(self._shorter[state], character)
                waiting.append(following)
            # A text also ends with the stop texts of its suffixes; the longest stop text is the one that begins first.
            self.longest[state] = self.longest[state] or self.longest[self._shorter[state]]

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        # The depth falls at most as far as earlier steps have raised it, so the total time is linear.
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)


class StopScan:
    """The search for the first stop text in a growing text.

    Attributes:
        found: position of its first character; None if there is none yet.
    """

    def __init__(self, stops: StopTexts) -> None:
        self._stops = stops
        self._seen, self._state = "", 0
        self.found: int | None = None

    @property
    def num_pending(self) -> int:
        """Number of characters at the end that may be the beginning of a stop text."""
        return self._stops.depth[self._state]

    def read(self, text: str) -> None:
        """Search the text, given in whole; only its new part takes time, unless the part before has changed."""
        if not text.startswith(self._seen):
            self._seen, self._state, self.found = "", 0, None
        for end in range(len(self._seen), len(text)):
            self._state = self._stops.step(self._state, text[end])
            if longest := self._stops.longest[self._state]:
                begin = end + 1 - longest
                self.found = begin if self.found is None else min(self.found, begin)
        self._seen = text
