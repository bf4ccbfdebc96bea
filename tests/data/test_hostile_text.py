"""Pipes in the place of a corpus, lines and archives without an end, and patterns of tokenizers that take for ever."""

from __future__ import annotations

import gzip
import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import zstandard
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from megatron.data import corpus
from megatron.data.corpus import read_blocks
from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import HuggingFaceTokenizer
from megatron.data.slow_patterns import check_patterns
from megatron.files.regular import UnfitFile, open_stream
from megatron.tasks.reading import read_task_text

LINES = b"".join(b'{"text": "line %d"}\n' % number for number in range(20_000))


def words(file: str, **how: bool) -> bytes:
    return b"".join(line.text for block in read_blocks([file], **how) for line in block)


def writer(path: Path, data: bytes, after: float = 0.0) -> threading.Thread:
    def write() -> None:
        time.sleep(after)
        path.write_bytes(data)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("name", "data"), [("c.jsonl", LINES), ("c.jsonl.gz", gzip.compress(LINES))])
def test_a_corpus_may_come_through_a_pipe(name: str, data: bytes, tmp_path: Path) -> None:
    """As a shell's `<(...)` gives it, and as a named one whose writer comes later."""
    path = tmp_path / name
    os.mkfifo(path)
    thread = writer(path, data, after=0.2)
    assert words(str(path), pipes=True) == LINES
    thread.join()


def test_a_corpus_may_come_through_standard_input() -> None:
    end, start = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(start, LINES[:60_000]), os.close(start)))
    thread.start()
    with open_stream(f"/dev/fd/{end}") as stream:
        assert stream.read() == LINES[:60_000]
    thread.join()
    with open_stream(f"/dev/fd/{end}") as stream:  # empty, and its writer has gone
        assert stream.read() == b""
    os.close(end)


def test_a_pipe_into_which_nobody_writes_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(UnfitFile, match="a named pipe to which no program writes"):
        open_stream(tmp_path / "c.jsonl", pipe_timeout=0.1)
    with pytest.raises(DataError, match="a named pipe, not a regular file"):  # a task's file is read twice
        words(str(tmp_path / "c.jsonl"))


def test_a_slow_writer_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "c")
    held = os.open(path, os.O_RDWR)
    opened = open_stream(path, pipe_timeout=0.1)  # a writer is open, and has written nothing
    os.write(held, b"late")
    os.close(held)
    assert opened.read() == b"late"
    opened.close()


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
def test_a_line_without_an_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB in a few kB: no more of it is unpacked than a line may have."""
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / name
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(b"a" * (1 << 26), 1))
        case ".zst":
            path.write_bytes(zstandard.compress(b"a" * (1 << 26)))
        case _:
            path.write_bytes(b"a" * 4096)
            os.truncate(path, 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"c\.jsonl.*:1: a line of more than 1,048,576 bytes"):
        words(str(path))
    with pytest.raises(DataError, match=r"more than (the )?1,048,576"):
        read_task_text(str(path), 1 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


BASE = Tokenizer(models.BPE(vocab={chr(code): code for code in range(32, 127)}, merges=[]))
GOOD = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r"\d{1,3}(?=(?:\d{3})*\b)",
]
BAD = [r"(a+)+$", r"(\w+\s?)*$", r"(x+x+)+y", r"x(a+)+y", r"((ab)+)+$", r"(\p{L}+\p{M}*)+\p{N}"]


def tokenizer(pattern: str, folder: Path, part: str = "pre_tokenizer") -> str:
    backend = Tokenizer.from_str(BASE.to_str())
    if part == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(pattern), "-")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated")])
    path = folder / "tokenizer.json"
    path.write_text(backend.to_str())
    return str(path)


@pytest.mark.parametrize("pattern", BAD)
def test_a_pattern_that_takes_for_ever_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes for ever") as caught:
        HuggingFaceTokenizer(tokenizer(pattern, tmp_path))
    assert repr(pattern) in str(caught.value) and "tokenizer.json" in str(caught.value)


def test_a_normalizer_that_takes_for_ever_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes for ever"):
        HuggingFaceTokenizer(tokenizer(r"(a|aa)+$", tmp_path, "normalizer"))


@pytest.mark.parametrize("pattern", GOOD)
def test_patterns_that_people_use_are_read(pattern: str, tmp_path: Path) -> None:
    found = HuggingFaceTokenizer(tokenizer(pattern, tmp_path))
    assert found.detokenize(found.tokenize("abc 123")).replace(" ", "") == "abc123"


def test_a_panic_of_the_library_is_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.fast_tokenizers.check_patterns", lambda *_: None)
    found = HuggingFaceTokenizer(tokenizer(r"(x+x+)+y", tmp_path))
    with pytest.raises(DataError, match="the tokenizers package failed"):
        found.tokenize("x" * 26)


@pytest.mark.parametrize("steps", [[normalizers.Replace(".", "x" * 100)] * 2, [normalizers.Prepend("x" * 10_000)]])
def test_a_normalizer_that_fills_the_memory_is_refused(steps: list[normalizers.Normalizer], tmp_path: Path) -> None:
    backend = Tokenizer.from_str(BASE.to_str())
    backend.normalizer = normalizers.Sequence(steps)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(DataError, match=r"10,00[01] characters of a single one"):
        HuggingFaceTokenizer(str(tmp_path))


def test_a_text_that_the_library_refuses_is_words(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.Unigram([("a", -1.0)], None, False)).to_str())
    found = HuggingFaceTokenizer(str(tmp_path))
    assert found.tokenize("aa") == [0, 0]
    for work in (found.tokenize, lambda text: found.tokenize_many([text])):
        with pytest.raises(DataError, match=r"refuses this: .*unk_id"):
            work("ab")


def test_tokenizers_without_patterns_cost_nothing() -> None:
    began = time.thread_time()
    check_patterns(BASE, "none")
    assert time.thread_time() - began < 0.05
    assert json.loads(BASE.to_str())["pre_tokenizer"] is None
