"""Find regular expressions of a tokenizer.json that take exponential time, before they meet a text.

A pattern such as `(a+)+$` tries every way to split a run of letters: each further letter doubles the time, and with twenty-five
of them the library panics, or a run seems to hang. It is hard to recognize such patterns by their form. So they are tried on
runs of characters that they may match, of growing length, while the CPU time of this thread is measured.
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

RUN_LENGTHS = (8, 12, 16, 20, 24, 28, 32, 48, 64, 96)  # of a run; a pattern that doubles is found before it takes a second
FREE_SECONDS, SECONDS_PER_CHARACTER = 0.1, 5e-6  # of processor time that a text may take; 20 times what good patterns take
RUN_CHARACTERS = ("a", "A", "1", " ", "\n", ".", "_", "é", "中", "\u0301")  # one of each class that patterns name
RUN_ENDS = ("!", "\0", "z")  # what a run is followed by, so that a match that wants the end of the text fails
MAX_LITERALS = 16
MAX_GROWTH = 1000  # characters that a tokenizer may make of one, by replacing it again and again; NFKC makes 18 of one


def check_patterns(backend: Backend, name: str) -> None:
    """Check that a tokenizer takes time and memory in proportion to a text; DataError if not. name: of its file."""
    normalizer, pre_tokenizer, decoder = backend.normalizer, backend.pre_tokenizer, backend.decoder
    parts: list[tuple[Any, Callable[[str], object]]] = []
    if normalizer is not None:
        parts.append((normalizer, normalizer.normalize_str))
    if pre_tokenizer is not None:
        parts.append((pre_tokenizer, pre_tokenizer.pre_tokenize_str))
    if decoder is not None:
        parts.append((decoder, lambda text: decoder.decode([text])))
    for part, run in parts:
        described = json.loads(part.__getstate__())
        if (growth := _growth(described)) > MAX_GROWTH:
            raise DataError(f"{name}: it makes {growth:,} characters of a single one; it is no tokenizer to work with")
        patterns = _patterns(described)
        for text in _texts(patterns):
            if not _quick(run, text):
                listed = " or ".join(repr(pattern[:100]) for pattern in patterns[:3])
                raise DataError(
                    f"{name}: its regular expression {listed} takes for ever on short texts, as nested repetitions such as "
                    "(a+)+ do; it is no tokenizer to work with"
                )


@contextmanager
def panics_as_data_errors(name: str) -> Iterator[None]:
    """Turn a panic of the `tokenizers` package, which is no Exception, into a DataError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{name}: the tokenizers package gave up: {' '.join(str(error).split())[:200]}") from None


@contextmanager
def failures_as_data_errors(name: str) -> Iterator[None]:
    """Turn panics and plain Exceptions of the package into a DataError: without an unknown token it refuses most texts."""
    try:
        with panics_as_data_errors(name):
            yield
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises plain ones
            raise
        raise DataError(f"{name}: the tokenizers package refuses this: {' '.join(str(error).split())[:200]}") from None


def _growth(described: Any) -> int:
    """Return the maximum number of characters that one character can become in this part of a tokenizer."""
    if isinstance(described, list):
        return math.prod(map(_growth, described))
    if not isinstance(described, dict):
        return 1
    # What is put in place of a character, or before it.
    own = max(1, len(str(described.get("content", ""))), len(str(described.get("prepend", ""))) + 1)
    return own * math.prod(_growth(value) for value in described.values() if isinstance(value, dict | list))


def _patterns(described: Any) -> list[str]:
    """Return the regular expressions in one part of a tokenizer, as tokenizer.json describes it."""
    found: list[str] = []
    values: list[Any] = [described]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if isinstance(pattern := value.get("Regex"), str):
                found.append(pattern)
            values += value.values()
        elif isinstance(value, list):
            values += value
    return found


def _texts(patterns: list[str]) -> Iterator[str]:
    """Yield runs of single characters and of words that the patterns name; then texts of many such runs."""
    if not patterns:
        return
    whole = "".join(patterns)
    literals = list(dict.fromkeys(c for c in whole if c not in "\\()[]{}|?*+^$"))[:MAX_LITERALS]
    words = list(dict.fromkeys(re.findall(r"\w{2,8}", whole)))[:MAX_LITERALS]
    units = list(dict.fromkeys([*RUN_CHARACTERS, *literals, *words, "a ", "a1", "a.", "ab"]))
    for length in RUN_LENGTHS:
        # One by one: in a longer text a match might go on to the end that it wants. And with all literals behind, not beside:
        # the library knows at once that there is no match where a literal is nowhere.
        for end in (*RUN_ENDS, RUN_ENDS[0] + "".join(literals)):
            yield from (unit * length + end for unit in units)
        for first in literals:
            yield "".join(first + unit * length + RUN_ENDS[0] for unit in units)


def _quick(run: Callable[[str], object], text: str) -> bool:
    """Return whether a text takes no more than the allowed time. A second try counts, since the first may build tables."""
    due = FREE_SECONDS + SECONDS_PER_CHARACTER * len(text)
    for _ in range(2):
        began = time.thread_time()
        try:
            with panics_as_data_errors("a text"):
                run(text)
        except DataError:
            return False
        except Exception:  # it refuses such a text, and at once
            return True
        taken = time.thread_time() - began
        if taken < due:
            return True
        if taken > 10 * due:
            break
    return False
