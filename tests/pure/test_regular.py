"""Files that are read, those that are refused, and the words of the refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_ins import make_stand_in

from megatron.files import regular
from megatron.files.regular import (
    UnfitFile,
    check_regular,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "a named pipe, not a regular file"),
        (Path.mkdir, "a directory, not a regular file"),
        (lambda path: make_stand_in("socket", path, b""), "a socket, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a regular file"),
        (
            lambda path: make_stand_in("huge", path, b""),
            "1,099,511,627,776 bytes, more than the 1,000 allowed for such a file",
        ),
        (lambda path: path.symlink_to("nowhere"), "a link to nowhere, which does not exist"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
    ],
)
@pytest.mark.parametrize("reader", [check_regular, open_regular, read_bytes, read_text, read_json])
def test_what_is_no_regular_file_of_a_bounded_size_is_refused(
    make: Callable[[Path], object], words: str, reader: Callable[[Path, int], object], tmp_path: Path
) -> None:
    make(path := tmp_path / "config.json")
    with pytest.raises(OSError, match=words) as caught:
        reader(path, 1000)
    assert caught.value.strerror == words
    assert str(caught.value.filename) == str(path)


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b'{"a": "\xc3\xa9"}')
    link = tmp_path / "link"
    link.symlink_to("it")
    assert check_regular(link, 11) == 11
    assert read_bytes(link, 11) == b'{"a": "\xc3\xa9"}'
    assert read_text(link, 11) == '{"a": "é"}'
    assert read_json(link) == {"a": "é"}
    with open_regular(link) as file:
        assert file.read() == b'{"a": "\xc3\xa9"}'
    with pytest.raises(UnfitFile, match=r"it: 11 bytes, more than the 10"):
        read_bytes(tmp_path / "it", 10)


def test_a_file_that_is_longer_than_it_says_is_bounded() -> None:
    """Files of /proc say that they are empty."""
    whole = read_bytes("/proc/self/status", 1 << 20)
    assert whole.startswith(b"Name:")
    with pytest.raises(UnfitFile, match="more than the 10"):
        read_bytes("/proc/self/status", 10)


def test_a_name_that_cannot_be_one_is_refused() -> None:
    """In the same words on every Python, whose own differ."""
    with pytest.raises(UnfitFile) as caught:
        read_bytes("a\0b", 10)
    assert str(caught.value) == r"'a\x00b': not a file name: it contains a null byte"
    with pytest.raises(UnfitFile, match=r"not a file name: .*surrogates not allowed"):
        read_bytes("a\ud800b", 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 1_000_000, "it is nested too deeply"),
        ('{"a": ' * 1_000_000, "it is nested too deeply"),
        ("1" * 1_000_000, "a number in it has more than 4300 digits"),
        (b'"\xff"', "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_none_is_a_value_error_in_words(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


def test_json_of_too_many_values_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte that is packed can hold eighty million lists, of 64 bytes each. Brackets and commas in strings are text."""
    monkeypatch.setattr(regular, "MAX_VALUES", 100)
    texts = ("[{,]" * 500, '\\"[,' * 500, "\\" * 500 + "[,", ",," * 500 + "\\")
    assert parse_json(json.dumps(texts)) == list(texts)
    monkeypatch.setattr(regular.json, "loads", lambda text: pytest.fail("it was built"))
    lists, numbers, strings = "[" + "[]," * 100 + "[]]", '{"a": "\\\\", "b": [' + "1," * 100 + "1]}", '["\\""' + ',""' * 101
    for text in (lists, numbers, strings):
        with pytest.raises(ValueError, match="more than 100 values"):
            parse_json(text)


def test_json_may_begin_with_a_byte_order_mark() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
