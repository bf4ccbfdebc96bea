"""Read the files of --data-args-path and --per-split-data-args-path into the settings of data paths that they replace."""

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
DATA_SOURCES = (*FILES, "data.data_path", *SPLITS.values(), "data.mock_data")  # a file excludes all the others


@dataclass(frozen=True)
class Word:
    """A weight or a prefix, with its place in the file, for messages."""

    text: str
    place: str


class DataArgsError(Exception):
    """A file of data paths cannot be read, or has the wrong format; the text continues a message that begins with the file."""


def expand_data_args(values: Mapping[str, Any], *, check_datasets: bool) -> tuple[dict[str, Any], list[Problem]]:
    """Replace the settings that name files of data paths by the data paths in these files.

    Args:
        values: `section.field` -> value, as the user gave them.
        check_datasets: check also that the datasets exist and can be read.

    Returns:
        The new values, and the mistakes. Nothing is taken from a file with mistakes.
    """
    expanded = {name: value for name, value in values.items() if name not in FILES}
    problems: list[Problem] = []
    for name in FILES:
        if (path := values.get(name)) is None:
            continue
        what = flag_text(name, path)
        if other := next((o for o in DATA_SOURCES if o != name and values.get(o)), None):
            problems.append(Problem(f"{what} and {flag_text(other, values[other])}", "exclude each other; give one of them"))
            continue
        try:
            lists = {"data.data_path": _read_words(path)} if name == FILES[0] else dict(_read_lists(path))
            file_problems = [problem for words in lists.values() for problem in _check_words(what, words, check_datasets)]
        except DataArgsError as error:
            file_problems = [Problem(what, str(error))]
        problems += file_problems
        if not file_problems:
            expanded |= {setting: tuple(word.text for word in words) for setting, words in lists.items()}
    return expanded, problems


def _read_words(path: str) -> list[Word]:
    """Read a text file with the words that would follow --data-path. DataArgsError if it is unreadable or empty."""
    try:
        # Editors on Windows begin a file with a byte order mark, which would be part of the first word.
        lines = read_text(path, MAX_SETTINGS_BYTES).removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError:
        raise DataArgsError("is not a text file in UTF-8") from None
    except OSError as error:
        raise DataArgsError(f"cannot be read: {error_reason(error)}") from None
    words = [Word(text, f"line {number}") for number, line in enumerate(lines, 1) for text in line.split()]
    if not words:
        raise DataArgsError("is empty; it should contain PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...")
    return words


def _read_lists(path: str) -> Iterator[tuple[str, list[Word]]]:
    """Read a JSON file and yield each setting that it gives, with its words. DataArgsError if its form is wrong."""
    try:
        lists = read_json(path)
    except OSError as error:
        raise DataArgsError(f"cannot be read: {error_reason(error)}") from None
    except ValueError as error:
        raise DataArgsError(f"is not JSON: {error}") from None
    form = 'it should contain {"train": [...], "valid": [...], "test": [...]}, each list as after --data-path'
    if not isinstance(lists, dict):
        raise DataArgsError(f"is not a JSON object; {form}")
    if unknown := [key for key in lists if key not in SPLITS]:
        raise DataArgsError(f"has the unknown key {unknown[0][:40]!r}; {form}")
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


def _check_words(what: str, words: Sequence[Word], check_datasets: bool) -> Iterator[Problem]:
    """Yield the mistakes in the words of a file, each with its line or item."""
    texts = [word.text for word in words]
    dataset_prefixes = prefixes(texts)
    if dataset_prefixes is None:
        yield Problem(what, f"{_first_irregular(words).place}: {blend_error(texts)}")
        return
    if error := blend_error(texts):
        # `blend_error` does not return a position, so each weight is checked again by itself to find the wrong one.
        wrong_weight = next(word for word in words[::2] if blend_error((word.text, "prefix")))
        yield Problem(what, f"{wrong_weight.place}: {error}")
    if not check_datasets:
        return
    for word in words if len(dataset_prefixes) == len(words) else words[1::2]:
        yield from missing_dataset(f"{what}, {word.place}: `{word.text}`", word.text)


def _first_irregular(words: Sequence[Word]) -> Word:
    """Return the first word that breaks the pattern that the first one sets: prefixes only, or weights and prefixes in turn."""
    is_number = [parse_number(word.text) is not None for word in words]
    expected = [is_number[0] and index % 2 == 0 for index in range(len(words))]
    return next((word for word, found, wanted in zip(words, is_number, expected, strict=True) if found != wanted), words[-1])
