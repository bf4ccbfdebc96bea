"""Read the files of --data-args-path and --per-split-data-args-path into the settings whose values they hold."""

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
OTHERS = (*FILES, "data.data_path", *SPLITS.values(), "data.mock_data")  # each excludes the files


@dataclass(frozen=True)
class Word:
    """A weight or a prefix, with its place in the file, for messages."""

    text: str
    place: str


class DataArgsError(Exception):
    """A file of data paths is not in its format; the text continues a sentence that begins with the file."""


def expand_data_args(values: Mapping[str, Any], *, files: bool) -> tuple[dict[str, Any], list[Problem]]:
    """Replace the settings that name files of data paths by the paths that the files hold.

    Args:
        values: `section.field` -> value, as the user gave them.
        files: look for the datasets that the files name.

    Returns:
        The new values, and the mistakes; a file with mistakes gives no paths.
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
            lists = {"data.data_path": _read_words(path)} if name == FILES[0] else dict(_read_lists(path))
            wrong = [problem for words in lists.values() for problem in _check_words(what, words, files)]
        except DataArgsError as error:
            wrong = [Problem(what, str(error))]
        problems += wrong
        if not wrong:
            found |= {own: tuple(word.text for word in words) for own, words in lists.items()}
    return found, problems


def _read_words(path: str) -> list[Word]:
    """Read a text file of words as they follow --data-path. DataArgsError when it holds none."""
    try:
        # Editors on Windows begin a file with a byte order mark, which would be part of the first word.
        lines = read_text(path, MAX_SETTINGS_BYTES).removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError:
        raise DataArgsError("is not a text file in UTF-8") from None
    except OSError as error:
        raise DataArgsError(f"cannot be read: {error_reason(error)}") from None
    words = [Word(text, f"line {number}") for number, line in enumerate(lines, 1) for text in line.split()]
    if not words:
        raise DataArgsError("holds nothing; it should hold PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")
    return words


def _read_lists(path: str) -> Iterator[tuple[str, list[Word]]]:
    """Read a JSON file and yield each setting that it gives, with its words. DataArgsError when its form is wrong."""
    try:
        lists = read_json(path)
    except OSError as error:
        raise DataArgsError(f"cannot be read: {error_reason(error)}") from None
    except ValueError as error:
        raise DataArgsError(f"is not JSON: {error}") from None
    form = 'it should hold {"train": [...], "valid": [...], "test": [...]}, each list as after --data-path'
    if not isinstance(lists, dict):
        raise DataArgsError(f"holds no JSON object; {form}")
    if strange := [key for key in lists if key not in SPLITS]:
        raise DataArgsError(f"has the key {strange[0][:40]!r}; {form}")
    if not any(lists.values()):
        raise DataArgsError(f"names no dataset; {form}")
    for key, name in SPLITS.items():
        items = lists.get(key)
        if isinstance(items, str):
            items = items.split()
        if not isinstance(items, list | None):
            raise DataArgsError(f"has no list under {key!r}; {form}")
        words = []
        for number, item in enumerate(items or [], 1):
            if not isinstance(item, str | int | float) or isinstance(item, bool) or not str(item).strip():
                raise DataArgsError(f"{key}, item {number}: {str(item)[:40]!r} is neither a weight nor a prefix; {form}")
            words.append(Word(str(item).strip(), f"{key}, item {number}"))
        if words:
            yield name, words


def _check_words(what: str, words: Sequence[Word], files: bool) -> Iterator[Problem]:
    """Yield the mistakes in the words of a file, each with its line or item."""
    texts = [word.text for word in words]
    named = prefixes(texts)
    if named is None:
        yield Problem(what, f"{_first_irregular(words).place}: {blend_error(texts)}")
        return
    if fault := blend_error(texts):
        # Find the weight that is at fault: the same check, of each weight alone.
        light = next(word for word in words[::2] if blend_error((word.text, "prefix")))
        yield Problem(what, f"{light.place}: {fault}")
    if not files:
        return
    for word in words if len(named) == len(words) else words[1::2]:
        yield from missing_dataset(f"{what}, {word.place}: `{word.text}`", word.text)


def _first_irregular(words: Sequence[Word]) -> Word:
    """Return the first word that does not fit the list's form, prefixes alone or a weight before each."""
    numbers = [parse_number(word.text) is not None for word in words]
    expected = [numbers[0] and place % 2 == 0 for place in range(len(words))]
    return next((word for word, is_one, should in zip(words, numbers, expected, strict=True) if is_one != should), words[-1])
