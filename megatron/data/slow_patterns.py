"""Find regular expressions of a tokenizer.json that take exponential time, before texts are tokenized.

A pattern such as `(a+)+$` tries every way to split a run of letters: each further letter doubles the time, and with
twenty-five of them the library panics, or the program seems to hang. It is hard to recognize such patterns by their form. So
they are tested on runs of characters that they may match, of growing length, while the CPU time of this thread is measured.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer as Backend

from megatron.data.errors import DataError

RUN_LENGTHS = (
    8,
    12,
    16,
    20,
    24,
    28,
    32,
    48,
    64,
    96,
)  # repetitions in a run; they grow slowly enough to find exponential patterns within a second
FREE_SECONDS, SECONDS_PER_CHARACTER = 0.1, 5e-6  # CPU time that a text may take; 20 times that of good patterns
RUN_CHARACTERS = ("a", "A", "1", " ", "\n", ".", "_", "é", "中", "\u0301")  # one of each class of characters that patterns use
RUN_ENDS = ("!", "\0", "z")  # characters after a run, so that a match that requires the end of the text fails
MAX_LITERALS = 16  # literal characters, and words, of the patterns that are used in test texts
MAX_GROWTH = 1000  # characters that one character may become by repeated replacement; 18 with NFKC


def check_patterns(backend: Backend, name: str) -> None:
    """Check that a tokenizer's time and memory are proportional to a text; DataError if not. name: name of its file."""
    normalizer, pre_tokenizer, decoder = backend.normalizer, backend.pre_tokenizer, backend.decoder
    parts: list[tuple[Any, Callable[[str], object]]] = []
    if normalizer is not None:
        parts.append((normalizer, normalizer.normalize_str))
    if pre_tokenizer is not None:
        parts.append((pre_tokenizer, pre_tokenizer.pre_tokenize_str))
    if decoder is not None:
        parts.append((decoder, lambda text: decoder.decode([text])))
    for part, run in parts:
        description = json.loads(part.__getstate__())
        if (growth := _growth(description)) > MAX_GROWTH:
            raise DataError(f"{name}: it makes {growth:,} characters of a single one; use another tokenizer")
        patterns = _patterns(description)
        for text in _test_texts(patterns):
            if not _is_fast(run, text):
                listed = " or ".join(repr(pattern[:100]) for pattern in patterns[:3])
                raise DataError(
                    f"{name}: its regular expression {listed} takes for ever on short texts, as nested repetitions such as "
                    "(a+)+ do; use another tokenizer"
                )


@contextmanager
def panics_as_data_errors(name: str) -> Iterator[None]:
    """Turn a panic of the `tokenizers` package, which is not an Exception, into a DataError. name: begins the message."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{name}: the tokenizers package failed: {' '.join(str(error).split())[:200]}") from None


@contextmanager
def failures_as_data_errors(name: str) -> Iterator[None]:
    """Turn panics and plain Exceptions of the package into a DataError; it raises them for unknown characters, for example."""
    try:
        with panics_as_data_errors(name):
            yield
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises plain Exceptions
            raise
        raise DataError(f"{name}: the tokenizers package refuses this: {' '.join(str(error).split())[:200]}") from None


def _growth(description: Any) -> int:
    """Return an upper bound of the number of characters that one character can become in this part of a tokenizer."""
    if isinstance(description, list):
        return math.prod(map(_growth, description))
    if not isinstance(description, dict):
        return 1
    # A step puts `content` in place of a character, or `prepend` before it.
    own = max(1, len(str(description.get("content", ""))), len(str(description.get("prepend", ""))) + 1)
    return own * math.prod(_growth(value) for value in description.values() if isinstance(value, dict | list))


def _patterns(description: Any) -> list[str]:
    """Return the regular expressions in tokenizer.json's description of one part of a tokenizer."""
    found: list[str] = []
    values: list[Any] = [description]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if isinstance(pattern := value.get("Regex"), str):
                found.append(pattern)
            values += value.values()
        elif isinstance(value, list):
            values += value
    return found


def _test_texts(patterns: list[str]) -> Iterator[str]:
    """Yield runs of characters and of words that the patterns may match, then texts of many such runs, by growing length."""
    if not patterns:
        return
    joined = "".join(patterns)
    literals = list(dict.fromkeys(c for c in joined if c not in "\\()[]{}|?*+^$"))[:MAX_LITERALS]
    words = list(dict.fromkeys(re.findall(r"\w{2,8}", joined)))[:MAX_LITERALS]
    units = list(dict.fromkeys([*RUN_CHARACTERS, *literals, *words, "a ", "a1", "a.", "ab"]))
    for length in RUN_LENGTHS:
        # Each run alone, since in a longer text a match might extend to an end that it accepts. Also with all literals after
        # the run, since the library rejects a text at once if a required literal is missing.
        for end in (*RUN_ENDS, RUN_ENDS[0] + "".join(literals)):
            yield from (unit * length + end for unit in units)
        for first in literals:
            yield "".join(first + unit * length + RUN_ENDS[0] for unit in units)


def _is_fast(run: Callable[[str], object], text: str) -> bool:
    """Return whether a text takes no more than the allowed time, in one of two attempts, since the first may build tables."""
    limit = FREE_SECONDS + SECONDS_PER_CHARACTER * len(text)
    for _ in range(2):
        began = time.thread_time()
        try:
            with panics_as_data_errors("a text"):
                run(text)
        except DataError:
            return False
        except Exception:  # rejecting a text is fast
            return True
        taken = time.thread_time() - began
        if taken < limit:
            return True
        if taken > 10 * limit:
            break
    return False
