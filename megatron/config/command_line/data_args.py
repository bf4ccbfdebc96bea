"""Files of data paths: --data-args-path and --per-split-data-args-path. What they hold takes the place of the flags' values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.data import blend_error, missing_dataset, parse_number, prefixes
from megatron.config.errors import Problem
from megatron.config.options import flag_text
from megatron.files.regular import MAX_SETTINGS_BYTES, error_reason, read_json, read_text

SPLITS = {"train": "data.train_data_path", "valid": "data.valid_data_path", "test": "data.test_data_path"}
FILES = ("data.data_args_path", "data.per_split_data_args_path")
OTHERS = (*FILES, "data.data_path", *SPLITS.values(), "data.mock_data")  # none of which goes with one of FILES


@dataclass(frozen=True)
class Word:
    """A weight or a prefix, and where in its file it stands."""

    text: str
    place: str


class BadFileError(Exception):
    """What is wrong with a file of data paths."""


def expand_data_args(values: Mapping[str, Any], *, files: bool) -> tuple[dict[str, Any], list[Problem]]:
    """Put what files of data paths hold in the place of the files' names.

    Args:
        values: `section.field` -> value, as the user gave them.
        files: whether to look for the datasets that the files name.

    Returns:
        The values; and what is wrong, in which case the paths are left open.
    """
    found = {name: value for name, value in values.items() if name not in FILES}
    problems: list[Problem] = []
    for name in FILES:
        if (path := values.get(name)) is None:
            continue
        what = flag_text(name, path)
        if other := next((o for o in OTHERS if o != name and values.get(o)), None):
            problems.append(Problem(f"{what} and {flag_text(other, values[other])}", "exclude each other; give one of them"))
            continue
        try:
            lists = {"data.data_path": _words(path)} if name == FILES[0] else dict(_lists(path))
            wrong = [problem for words in lists.values() for problem in _faults(what, words, files)]
        except BadFileError as error:
            wrong = [Problem(what, str(error))]
        problems += wrong
        if not wrong:
            found |= {own: tuple(word.text for word in words) for own, words in lists.items()}
    return found, problems


def _words(path: str) -> list[Word]:
    try:
        lines = read_text(path, MAX_SETTINGS_BYTES).removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError:
        raise BadFileError("is not a text file in UTF-8") from None
    except OSError as error:
        raise BadFileError(f"cannot be read: {error_reason(error)}") from None
    words = [Word(text, f"line {number}") for number, line in enumerate(lines, 1) for text in line.split()]
    if not words:
        raise BadFileError("holds nothing; it should hold PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")
    return words


def _lists(path: str) -> Iterator[tuple[str, list[Word]]]:
    try:
        held = read_json(path)
    except OSError as error:
        raise BadFileError(f"cannot be read: {error_reason(error)}") from None
    except ValueError as error:
        raise BadFileError(f"is not JSON: {error}") from None
    form = 'it should hold {"train": [...], "valid": [...], "test": [...]}, each list as after --data-path'
    if not isinstance(held, dict):
        raise BadFileError(f"holds no JSON object; {form}")
    if strange := [key for key in held if key not in SPLITS]:
        raise BadFileError(f"has the key {strange[0][:40]!r}; {form}")
    if not any(held.values()):
        raise BadFileError(f"names no dataset; {form}")
    for key, name in SPLITS.items():
        items = held.get(key)
        if isinstance(items, str):
            items = items.split()
        if not isinstance(items, list | None):
            raise BadFileError(f"has no list under {key!r}; {form}")
        words = []
        for number, item in enumerate(items or [], 1):
            if not isinstance(item, str | int | float) or isinstance(item, bool) or not str(item).strip():
                raise BadFileError(f"{key}, item {number}: {str(item)[:40]!r} is neither a weight nor a prefix; {form}")
            words.append(Word(str(item).strip(), f"{key}, item {number}"))
        if words:
            yield name, words


def _faults(what: str, words: Sequence[Word], files: bool) -> Iterator[Problem]:
    texts = [word.text for word in words]
    named = prefixes(texts)
    if named is None:
        yield Problem(what, f"{_break(words).place}: {blend_error(texts)}")
        return
    if fault := blend_error(texts):
        light = next(word for word in words[::2] if blend_error((word.text, "prefix")))
        yield Problem(what, f"{light.place}: {fault}")
    if not files:
        return
    for word in words if len(named) == len(words) else words[1::2]:
        yield from missing_dataset(f"{what}, {word.place}: `{word.text}`", word.text)


def _break(words: Sequence[Word]) -> Word:
    """The word at which a list is no longer prefixes alone, or no longer a weight before each prefix."""
    numbers = [parse_number(word.text) is not None for word in words]
    wanted = [numbers[0] and place % 2 == 0 for place in range(len(words))]
    return next((word for word, is_one, should in zip(words, numbers, wanted, strict=True) if is_one != should), words[-1])
