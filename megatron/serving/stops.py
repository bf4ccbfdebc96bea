"""Find any of several stop texts in a growing text, in time linear in its length. No I/O.

The algorithm is that of Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (1975).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopTexts:
    """The Aho-Corasick automaton of the stop texts.

    Each state is a prefix of a stop text; state 0 is the empty prefix. After a text was read, the state is the text's longest
    suffix that is such a prefix.

    Attributes:
        depth: for each state, the length of its prefix in characters.
        longest: for each state, the length of the longest stop text that its prefix ends with; 0 if it ends with none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._transitions: list[dict[str, int]] = [{}]
        self._failure = [0]  # failure links: for each state, the state of its prefix's longest proper suffix
        self.depth, self.longest = [0], [0]
        for stop in stops:
            self._add(stop)
        self._set_failure_links()

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            next_state = self._transitions[state].get(character)
            if next_state is None:
                next_state = len(self._transitions)
                self._transitions[state][character] = next_state
                self._transitions.append({})
                self._failure.append(0)
                self.depth.append(self.depth[state] + 1)
                self.longest.append(0)
            state = next_state
        self.longest[state] = self.depth[state]

    def _set_failure_links(self) -> None:
        """Set the failure links in breadth-first order, since each depends on those of shorter prefixes."""
        queue = deque(self._transitions[0].values())
        while queue:
            state = queue.popleft()
            for character, next_state in self._transitions[state].items():
                self._failure[next_state] = self.step(self._failure[state], character)
                queue.append(next_state)
            # A prefix also ends with the stop texts that its suffixes end with. The longest one begins first.
            self.longest[state] = self.longest[state] or self.longest[self._failure[state]]

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        # Each iteration lowers the depth, and each step raises it by at most 1, so the total time is linear.
        while state and character not in self._transitions[state]:
            state = self._failure[state]
        return self._transitions[state].get(character, 0)


class StopScan:
    """The search for the first stop text in a growing text.

    Attributes:
        found: position of the first character of the first stop text; None if none has been found.
    """

    def __init__(self, stops: StopTexts) -> None:
        self._stops = stops
        self._scanned, self._state = "", 0
        self.found: int | None = None

    @property
    def num_pending(self) -> int:
        """Number of characters at the text's end that may be the beginning of a stop text."""
        return self._stops.depth[self._state]

    def read(self, text: str) -> None:
        """Search a text. If it continues the previous one, only the new part is scanned."""
        if not text.startswith(self._scanned):
            self._scanned, self._state, self.found = "", 0, None
        for end in range(len(self._scanned), len(text)):
            self._state = self._stops.step(self._state, text[end])
            if longest := self._stops.longest[self._state]:
                begin = end + 1 - longest
                self.found = begin if self.found is None else min(self.found, begin)
        self._scanned = text
