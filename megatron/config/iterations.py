"""Sets of iterations as a user writes them: `120 300-310`. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence


def ranges_of(words: Sequence[str]) -> tuple[range, ...]:
    """Each word, a number `N` or a range `A-B` with both ends, as a range. ValueError naming the word that is neither."""
    found = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"has {word!r}, which is no iteration and no range of iterations")
        found.append(range(first, last + 1))
    return tuple(found)
