"""Files of data paths: what they hold is what the flags would have said, and what is wrong is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from legal_run import LEGAL

from megatron.config.command_line.parse import Parsed, parse
from megatron.config.errors import ConfigError

BASE = [word for name, value in LEGAL.items() if name != "data-path" for word in (f"--{name}", value)]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A directory with the files of two datasets, which nobody opens here."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        for ending in (".bin", ".idx"):
            Path(name + ending).write_bytes(b"x")
    return tmp_path


def parse_with(*flags: str) -> Parsed:
    return parse([*BASE, *flags], program="test")


def parse_problems(*flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_with(*flags)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("text", ["a", "0.3 a 0.7 b", "0.3 a\n\n  0.7\tb\r\n", "a b", "\ufeffa\n"])
def test_a_file_is_what_would_follow_data_path(places, text):
    Path("blend.txt").write_text(text, encoding="utf-8", newline="")
    words = text.removeprefix("\ufeff").split()
    assert parse_with("--data-args-path", "blend.txt").config == parse_with("--data-path", *words).config
    Path("run.toml").write_text('[data]\ndata-args-path = "blend.txt"\n')
    assert parse_with("--config", "run.toml").config == parse_with("--data-path", *words).config


@pytest.mark.parametrize(
    "lists",
    [
        {"train": ["0.3", "a", "0.7", "b"], "valid": ["a"], "test": ["b"]},
        {"train": [0.3, "a", 0.7, "b"], "valid": "a", "test": None},
        {"train": " a  b ", "valid": []},
    ],
)
def test_a_json_file_is_the_flags_of_each_split(places, lists):
    Path("splits.json").write_text(json.dumps(lists))
    flags = []
    for key in ("train", "valid", "test"):
        words = lists.get(key) or []
        words = words.split() if isinstance(words, str) else [str(word) for word in words]
        flags += [f"--{key}-data-path", *words] if words else []
    assert parse_with("--per-split-data-args-path", "splits.json").config == parse_with(*flags).config


BAD_TEXTS = {
    "": "is empty; it should contain PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...",
    "0.3 a\n0.7": "line 2: mixes weights and prefixes;",
    "0.3 a\nb 0.7\n": "line 2: mixes weights and prefixes;",
    "a\nb\n0.7\n": "line 3: mixes weights and prefixes;",
    "0.3 a\n-1 b": "line 2: has the weight -1; weights are greater than 0",
    "0.3 a\n0.7 c": "line 2: `c` names no dataset: c.bin and c.idx do not exist",
}


@pytest.mark.parametrize("text", BAD_TEXTS, ids=repr)
def test_what_is_wrong_with_a_file_is_one_message_with_its_place(places, text):
    Path("blend.txt").write_text(text)
    (problem,) = parse_problems("--data-args-path", "blend.txt")
    assert problem.startswith("`--data-args-path blend.txt`") and BAD_TEXTS[text] in problem


BAD_JSON = {
    "[": "is not JSON:",
    '["a"]': "is not a JSON object;",
    "{}": "names no dataset;",
    '{"training": ["a"]}': "has the unknown key 'training';",
    '{"train": 1}': "has no list under 'train';",
    '{"train": ["a", true]}': "train, item 2: 'True' is neither a weight nor a prefix;",
    '{"train": ["a"], "valid": [["0.3", "a"]]}': "valid, item 1: \"['0.3', 'a']\" is neither a weight nor a prefix;",
    '{"train": ["a"], "valid": ["0.5", "a", "b"]}': "valid, item 3: mixes weights and prefixes;",
    '{"train": ["a"], "test": ["nan", "a", "1", "b"]}': "test, item 1: has the weight nan;",
    '{"train": ["a"], "test": ["a", "c"]}': "test, item 2: `c` names no dataset:",
}


@pytest.mark.parametrize("text", BAD_JSON)
def test_what_is_wrong_with_a_json_file_is_one_message_with_its_place(places, text):
    Path("splits.json").write_text(text)
    (problem,) = parse_problems("--per-split-data-args-path", "splits.json")
    assert problem.startswith("`--per-split-data-args-path splits.json`") and BAD_JSON[text] in problem


def test_a_file_that_cannot_be_read(places):
    Path("bytes").write_bytes(b"\xff\xfe\x00")
    for flag, name, rule in (
        ("--data-args-path", "gone", "cannot be read: No such file or directory"),
        ("--data-args-path", ".", "cannot be read: a directory, not a regular file"),
        ("--data-args-path", "bytes", "is not a text file in UTF-8"),
        ("--per-split-data-args-path", "gone", "cannot be read: No such file or directory"),
        ("--per-split-data-args-path", "bytes", "is not JSON: "),
    ):
        (problem,) = parse_problems(flag, name)
        assert problem.startswith(f"`{flag} {name}` {rule}")


def test_data_come_from_one_place(places):
    Path("blend.txt").write_text("a")
    for other in (["--data-path", "b"], ["--valid-data-path", "b"], ["--mock-data"], ["--per-split-data-args-path", "s"]):
        problems = parse_problems("--data-args-path", "blend.txt", *other)
        assert f"`--data-args-path blend.txt` and `{' '.join(other)}` exclude each other; give one of them" in problems
    for flag in ("--data-path", "--train-data-path", "--test-data-path"):
        (problem,) = parse_problems("--mock-data", flag, "a")
        assert problem == f"`--mock-data` and `{flag} a` exclude each other: the samples are synthetic, or read from files"
    assert parse_with("--mock-data").config.data.mock_data
    assert parse_problems() == ["`--data-path` is missing, and has no default"]


def test_nothing_is_written_over_a_file_of_data_paths(places):
    Path("blend.txt").write_text("a")
    Path("splits.json").write_text('{"train": ["a"]}')
    for flag, name in (("--data-args-path", "blend.txt"), ("--per-split-data-args-path", "splits.json")):
        assert any(
            f"`--metrics-path {name}` cannot be written" in problem
            for problem in parse_problems(flag, name, "--metrics-path", name)
        )


def test_iterations_to_skip_is_another_spelling():
    for words in (["--iterations-to-skip", "3", "7-9"], ["--skip-train-iterations", "3", "7-9"]):
        read_one = parse([*BASE, "--mock-data", *words], program="test", check_disk=False)
        assert read_one.config.batch.skip_train_iterations == ("3", "7-9")
