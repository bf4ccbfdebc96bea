"""Every file of a task against what people put in its place: one DataError, which names the file and the place in it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys

from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import BertWordPieceLowerCase
from megatron.tasks.glue import MNLI, PairClassification
from megatron.tasks.race import Race
from megatron.tasks.squad import Squad
from megatron.tasks.tagging import Tagging, collect_labels
from megatron.tasks.zeroshot import open_sources

Read = Callable[[Path], object]
HALF = "\ud83d"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Read]:
    """By task, what reads one of its files; RACE's is given the file and reads its directory."""
    words = BertWordPieceLowerCase(str(toys.write_vocabulary(tmp_path_factory.mktemp("vocab"))), 0)
    classes = ("contradiction", "entailment", "neutral")
    return {
        "MNLI": lambda path: PairClassification(words, 32, MNLI, classes).read(str(path), training=True),
        "RACE": lambda path: Race(words, 32, "ABCD").read(str(path.parent), training=True),
        "SQUAD": lambda path: Squad(words, 32).read(str(path), training=True),
        "NER": lambda path: Tagging(words, 32, collect_labels([str(path)])).read(str(path), training=True),
        "WIKITEXT103": lambda path: open_sources("WIKITEXT103", [str(path)]),
        "LAMBADA": lambda path: open_sources("LAMBADA", [str(path)]),
        "PERPLEXITY": lambda path: open_sources("PERPLEXITY", [str(path)]),
    }


def squad(**changed: Any) -> str:
    """One question about `The fox`. changed: what stands in place of what; None: nothing does."""
    values = {"context": "The fox", "id": "1", "question": "What?", "text": "fox", "answer_start": 4, **changed}
    answer = {key: values[key] for key in ("text", "answer_start") if values[key] is not None}
    qa = {key: values[key] for key in ("id", "question") if values[key] is not None}
    qa |= {"answers": values.get("answers", [answer])} | {k: v for k, v in values.items() if k == "is_impossible"}
    paragraph = {"context": values["context"], "qas": values.get("qas", [qa])}
    return json.dumps({"data": values.get("data", [{"paragraphs": [paragraph]}])})


def race(**changed: Any) -> str:
    return json.dumps({"article": "a", "questions": ["q _"], "options": [list("abcd")], "answers": ["A"], **changed})


QA = "data[0].paragraphs[0].qas[0]"
START = f": {QA}.answers[0].answer_start: it is "
SQUAD = [
    *(
        (squad(answer_start=value), f"{START}{shown}, not a whole number from 0 to 7")
        for value, shown in (
            (float("inf"), "Infinity"),
            (float("nan"), "NaN"),
            (1.5, "1.5"),
            (4.0, "4.0"),
            (True, "true"),
            (-3, "-3"),
            (8, "8"),
            (10**30, str(10**30)),
            ("4", '"4"'),
            ([4], "[4]"),
            ({}, "{}"),
            ([[]] * 50, json.dumps([[]] * 50)[:60] + "..."),
        )
    ),
    (squad(answer_start=4).replace('"answer_start": 4', '"answer_start": null'), f"{START}null, not a whole number"),
    (squad().replace(": 4}", ": 1e999}"), f"{START}Infinity, not"),
    (squad(answer_start=None), f": {QA}.answers[0]: it has no `answer_start` (its keys: text); expected SQuAD's JSON"),
    (
        squad(context=f"The fox {HALF}"),
        r": data[0].paragraphs[0].context: it contains half of a surrogate pair, \ud83d at character 8",
    ),
    (squad(question=HALF), f": {QA}.question: it contains half of a surrogate pair"),
    (squad(id=HALF), f": {QA}.id: it contains half of a surrogate pair"),
    (squad(text="\udc00"), f": {QA}.answers[0].text: it contains half of a surrogate pair"),
    (squad(text=""), f": {QA}.answers[0].text: it is empty; a question without an answer has"),
    (squad(text=3), f": {QA}.answers[0].text: it is a number 3, not text"),
    (squad(id=[1]), f": {QA}.id: it is a list, not text"),
    (squad(id=True), f": {QA}.id: it is true or false true, not text"),
    (squad(is_impossible="no"), f': {QA}.is_impossible: it is text "no", not true or false'),
    (squad(answers={"text": ["fox"], "answer_start": [4]}), f": {QA}.answers: it is an object, not a list"),
    (squad(answers=[4]), f": {QA}.answers[0]: it is a number 4, not an object"),
    (squad(qas=None), ": data[0].paragraphs[0].qas: it is null, not a list"),
    (squad(qas=[]), ": it contains no questions"),
    (squad(data={}), ": data: it is an object, not a list"),
    (squad(data=[[]]), ": data[0]: it is a list, not an object"),
    (squad(data=[{HALF: 1}]), r": data[0]: it has no `paragraphs` (its keys: \ud83d)"),
    ("[]", ": it is a list, not an object; expected SQuAD's JSON"),
    ('"data"', ': it is text "data", not an object'),
    ("null", ": it is null, not an object"),
    ("", ": it is not JSON: "),
    ("[" * 100_000, ": it is not JSON: it is nested too deeply"),
    ("9" * 5000, ": it is not JSON: a number in it has more than"),
    (squad()[:-9], ": it is not JSON: "),
]
RACE = [
    (race(article=HALF), ": article: it contains half of a surrogate pair"),
    (race(article=None), ": article: it is null, not text"),
    (race(questions=[HALF]), ": questions[0]: it contains half"),
    (race(options=[["a", "b", "c", HALF]]), ": options[0][3]: it contains half"),
    (race(options=["abcd"]), ': options[0]: it is text "abcd", not a list'),
    (race(options={}), ": options: it is an object, not a list"),
    (race(answers=[0]), ": answers[0]: it is a number 0, not text"),
    (race(answers=["E"]), ": answers[0]: it is 'E'; legal: A, B, C, D"),
    (race(answers=["A", "B"]), ": it has 1 questions, 1 options, 2 answers, whose numbers should be equal"),
    ("[" * 100_000, ": it is not JSON: it is nested too deeply"),
]
MNLI_HEAD = "pairID\tsentence1\tsentence2\tgold_label\n"
LINES = [
    ("MNLI", MNLI_HEAD + "1\ta\tb\tneutral\n2\ta\tb\tyes\n", ":3: gold_label is 'yes'"),
    ("MNLI", MNLI_HEAD.replace("\t", ",") + "1,a,b,neutral\n", ": its first line names no column pairID"),
    ("NER", "tom B-PER\n\nann\n", ":3: 'ann' is not a word and its tag"),
    ("LAMBADA", '{"text": "a b"}\n{"text": "a \\ud83d"}\n', ":2: the text of 'text' contains half of a surrogate pair"),
    ("LAMBADA", '{"text": "a b"}\n{"text": 1e999}\n', ":2: the value of 'text' is not text but a number"),
    ("LAMBADA", '{"text": "a b"}\n5\n', ":2: a number in JSON, not an object with the key 'text'"),
    ("LAMBADA", '{"text": "a b"}\n[]\n', ":2: a JSON array, not JSON lines; write one object per line"),
    ("LAMBADA", '{"texts": "a b"}\n', ":1: no key 'text' (the keys are: 'texts')"),
    ("LAMBADA", '{"text": ' + "[" * 100_000, ":1: not JSON (it is nested too deeply)"),
    *((task, "\n \n", ": ") for task in ("NER", "WIKITEXT103", "LAMBADA", "PERPLEXITY")),
]
TEXTS = [*(("SQUAD", *row) for row in SQUAD), *(("RACE", *row) for row in RACE), *LINES]
TASKS = ("MNLI", "RACE", "SQUAD", "NER", "WIKITEXT103", "LAMBADA", "PERPLEXITY")
BYTES = {
    "Git LFS": (LFS, ": it is a pointer of Git LFS, in place of the file itself; run `git lfs pull` where it was cloned"),
    "zip": (b"PK\x03\x04" + bytes(40), ": it is a zip archive; unpack it and name the files in it"),
    "a cut gzip": (gzip.compress(b"some text\n" * 9)[:-9], ": damaged after line "),
    "LZ4": (b"\x04\x22\x4d\x18" + bytes(40), ": it is compressed with LZ4; unpack it: `lz4 -d FILE`"),
    "zeros": (b"text" + bytes(40), ": it is not text: many of its bytes are zeros; give a text file in UTF-8"),
    "UTF-16": (
        "a b\n".encode("utf-16"),
        ": it is text in UTF-16, not UTF-8; convert it: `iconv -f UTF-16 -t UTF-8 FILE > NEW`",
    ),
    "UTF-16 without a mark": (
        "a b\n".encode("utf-16-le") * 9,
        ": it is text in UTF-16, not UTF-8; convert it: `iconv -f UTF-16LE -t UTF-8 FILE > NEW`",
    ),
    "Latin-1": ("a b\ncafé x\n".encode("latin-1"), ":2: not UTF-8 (invalid continuation byte at byte 3); save"),
}


def said(read: Read, path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    words = str(caught.value)
    assert words.startswith(str(path)) and len(words) < 500 and "\n" not in words, words
    return words


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_a_wrong_value_is_named_with_its_place(number: int, readers: dict[str, Read], tmp_path: Path) -> None:
    task, text, rule = TEXTS[number]
    (tmp_path / "wrong.txt").write_text(text)
    if task == "NER" and not text.strip():
        with pytest.raises(DataError, match="it contains no words"):
            readers["NER"](tmp_path / "wrong.txt")
        return
    assert said(readers[task], tmp_path / "wrong.txt").removeprefix(str(tmp_path / "wrong.txt")).startswith(rule)


@pytest.mark.parametrize("form", BYTES)
@pytest.mark.parametrize("task", TASKS)
def test_another_kind_of_file_is_named_as_what_it_is(task: str, form: str, readers: dict[str, Read], tmp_path: Path) -> None:
    data, rule = BYTES[form]
    (tmp_path / "wrong.txt").write_bytes(data)
    if (task, form) in {("LAMBADA", "Latin-1"), ("MNLI", "Latin-1")}:
        rule = ":1: not JSON" if task == "LAMBADA" else rule
    rule = rule.replace("FILE", str(tmp_path / "wrong.txt"))
    assert said(readers[task], tmp_path / "wrong.txt").removeprefix(str(tmp_path / "wrong.txt")).startswith(rule)


def test_what_windows_programs_leave_is_read(readers: dict[str, Read], tmp_path: Path) -> None:
    """A byte-order mark and line ends of two characters, in all of them; and packed in any way, under any name."""
    zstandard = pytest.importorskip("zstandard")
    good = {
        "MNLI": MNLI_HEAD + "1\ta\tb\tneutral\n",
        "RACE": race(),
        "SQUAD": squad(),
        "NER": "tom B-PER\n",
        "WIKITEXT103": "a b c\n",
        "LAMBADA": '{"text": "a b"}\n',
        "PERPLEXITY": "a b c\n",
    }
    for task, text in good.items():
        folder = tmp_path / task
        folder.mkdir()
        data = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
        (folder / "good.txt").write_bytes(data)
        assert readers[task](folder / "good.txt")
        for pack in (gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress):
            for name in ("good.txt", "good.txt.gz"):
                (folder / name).write_bytes(pack(data))
                assert readers[task](folder / name)
