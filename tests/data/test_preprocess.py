"""From JSON lines to datasets, through the commands that people type."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.config.schema import TokenizerConfig
from megatron.data.cuts import MAX_PART
from megatron.data.encode import PreprocessConfig
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import preprocess
from megatron.data.sentences import split_sentences
from megatron.data.tokenizer import build_tokenizer
from megatron.data.train_bpe import train_bpe
from megatron.data.train_wordpiece import train_wordpiece

TOOLS = Path(__file__).parents[2] / "tools"
TEXTS = ["Hello there.", "", "Second one: é.", "x" * 5000, "Last."]
BYTES = PreprocessConfig(TokenizerConfig(tokenizer_type="ByteTokenizer"), append_eod=True)


def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    """A tool, run from elsewhere as a user would."""
    command = [os.environ["WARM_PYTHON"], TOOLS / name, *map(str, args)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=False)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def documents(prefix: str) -> list[str]:
    dataset = IndexedDataset(prefix)
    bounds = dataset.documents.tolist()
    ids = [[t for s in range(a, b) for t in dataset[s].tolist()] for a, b in itertools.pairwise(bounds)]
    return ["".join("|" if t == 256 else chr(t) for t in row).encode("latin-1").decode() for row in ids]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return lines(tmp_path / "c.jsonl", [{"text": text, "title": f"t{i}"} for i, text in enumerate(TEXTS)])


def test_documents_and_sidecar(corpus: Path, tmp_path: Path) -> None:
    totals = preprocess([str(corpus)], str(tmp_path / "o"), BYTES)
    assert totals.prefixes == [str(tmp_path / "o_text_document")]
    assert documents(totals.prefixes[0]) == [text + "|" if text else "" for text in TEXTS]
    meta = IndexedDataset(totals.prefixes[0]).meta()
    assert (meta["tokenizer_type"], meta["vocab_size"], meta["eod"], meta["dtype"]) == ("ByteTokenizer", 257, 256, "uint16")
    assert (meta["documents"], meta["tokens"], totals.empty, totals.documents) == (5, totals.tokens, 1, 5)


def test_packed_files_globs_and_several_keys(corpus: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    data = corpus.read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.jsonl").write_bytes(data + b"\n  \n")  # blank lines are nothing
    (tmp_path / "in/2.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "in/3.jsonl.zst").write_bytes(pack(data[:100]) + pack(data[100:]))
    settings = PreprocessConfig(TokenizerConfig(tokenizer_type="ByteTokenizer"), keys=("text", "title"))
    totals = preprocess([str(tmp_path / "in/*")], str(tmp_path / "o"), settings)
    assert documents(str(tmp_path / "o_text_document")) == TEXTS * 3
    assert documents(str(tmp_path / "o_title_document")) == [f"t{i}" for i in range(5)] * 3
    assert totals.documents == 15
    for end, packed in {".gz": gzip.compress(data), ".zst": pack(data)}.items():
        for damage in (packed[:-9], packed[:20] + b"\xff" * 20 + packed[40:], packed[:1], b""):
            (tmp_path / f"bad.jsonl{end}").write_bytes(damage)
            with pytest.raises(DataError, match=rf"bad\.jsonl{end}: damaged after line"):
                preprocess([str(tmp_path / f"bad.jsonl{end}")], str(tmp_path / "b"), settings)


def test_output_does_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.corpus.BLOCK_BYTES", 2000)
    corpus = lines(tmp_path / "c.jsonl", [{"text": f"document {i} " * (i % 50)} for i in range(400)])
    for workers in (1, 3):
        preprocess([str(corpus)], str(tmp_path / f"w{workers}"), BYTES, workers)
    for end in ("bin", "idx"):
        one, three = ((tmp_path / f"w{w}_text_document.{end}").read_bytes() for w in (1, 3))
        assert one == three and len(one) > 1000


def test_text_is_cut_into_sentences(tmp_path: Path) -> None:
    text = 'Dr. Smith paid $3.50. "Really?" he asked. Yes! See e.g. fig. 2.\n\nA new paragraph without an end\n\nThe end.'
    expected = [
        "Dr. Smith paid $3.50.",
        '"Really?" he asked.',
        "Yes!",
        "See e.g. fig. 2.",
        "A new paragraph without an end",
        "The end.",
    ]
    assert list(split_sentences(text)) == expected
    assert "".join(split_sentences(text, keep_newlines=True)) == text
    corpus = lines(tmp_path / "c.jsonl", [{"text": text}, {"text": ""}, {"text": "One. Two."}])
    harmless = ("--lang", "english", "--dataset-impl", "mmap", "--partitions", 1)
    flags = ("--input", corpus, "--output-prefix", tmp_path / "o", "--tokenizer-type", "ByteTokenizer", "--append-eod")
    result = tool("preprocess_data.py", *flags, "--split-sentences", *harmless)
    assert result.returncode == 0, result.stderr
    dataset = IndexedDataset(str(tmp_path / "o_text_sentence"))
    assert dataset.documents.tolist() == [0, 6, 6, 8]
    assert bytes(dataset[2].tolist()) == b"Yes!" and dataset[7].tolist() == [*b"Two.", 256]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Authors: A. Adams, B. Brown et al. Then (in 1999.) "Yes." He left.',
            ["Authors: A. Adams, B. Brown et al. Then (in 1999.)", '"Yes."', "He left."],
        ),
        ("今天。明天! 后天。  Ok.", ["今天。", "明天! 后天。", "Ok."]),
        ("No. 5 is I. Fine.", ["No. 5 is I.", "Fine."]),
        ('a.b.c. Done… "And" so.', ["a.b.c.", "Done…", '"And" so.']),
        (" \n one\n \n\ttwo \n", ["one", "two"]),
        ("x" * 40 + ".B. Not an end. " + "X" * 40 + ". An end.", ["x" * 40 + ".B. Not an end.", "X" * 40 + ".", "An end."]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert list(split_sentences(text)) == expected
    assert "".join(split_sentences(text, keep_newlines=True)).strip() == text.strip()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("plain words", "plain text is not accepted"),
        ("[1, 2]", "a JSON array, not JSON lines"),
        ('{"body": "x"}', "no key 'text' (the keys are: 'body')"),
        ('{"text": 7}', "is not text but a number"),
        ('{"text": null}', "is not text but null"),
        (r'{"text": "\ud800"}', "surrogate"),
        ('{"text": "cut off', "not JSON"),
        ("[" * 100000, "not JSON"),
    ],
)
def test_bad_line(tmp_path: Path, line: str, reason: str) -> None:
    good = json.dumps({"text": "good"})
    (tmp_path / "c.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    args = (
        "preprocess_data.py",
        "--input",
        tmp_path / "c.jsonl",
        "--output-prefix",
        tmp_path / "o",
        "--tokenizer-type",
        "ByteTokenizer",
    )
    result = tool(*args)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tmp_path}/c.jsonl:2: "), result.stderr
    assert reason in result.stderr and "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_skipped_lines_are_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\nbroken\n{"text": "b"}\n\xff\xfe')
    result = tool("preprocess_data.py", "--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "o", "--tokenizer-type",
                  "ByteTokenizer", "--on-bad-line=skip", "--append-eod", "--json-key", "text")  # fmt: skip
    assert result.returncode == 0 and "2 documents, 4 tokens, 0 empty, 2 bad lines" in result.stdout
    assert (tmp_path / "o.bad.jsonl").read_bytes() == b"broken\n\xff\xfe\n"
    assert documents(str(tmp_path / "o_text_document")) == ["a|", "b|"]


def test_mistakes_before_any_work(corpus: Path, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    bert = ("--tokenizer-type", "BertWordPieceCase", "--vocab-file", vocab)
    byte = ("--tokenizer-type", "ByteTokenizer")
    damaged = tmp_path / "d.jsonl.gz"
    damaged.write_bytes(gzip.compress(corpus.read_bytes())[:40])
    empty = tmp_path / "e.jsonl"
    empty.write_text("\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    for args, message in {
        (corpus, *bert, "--append-eod"): "has no eod token",
        (corpus, "--tokenizer-type", "GPT2BPETokenizer"): "needs --vocab-file",
        (tmp_path / "none*.jsonl", *byte): "no such file",
        (tmp_path, *byte): "a directory",
        (damaged, *byte): "d.jsonl.gz: damaged after line 0",
        (empty, *byte): "no documents",
        (corpus, *byte, "--partitions", 2): "--partitions",
        (corpus, *byte, "--workers", 0): "--workers",
    }.items():
        result = tool("preprocess_data.py", "--output-prefix", tmp_path / "o", "--input", *args)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_leaves_nothing(tmp_path: Path, workers: int) -> None:
    os.mkfifo(tmp_path / "slow.jsonl")
    (tmp_path / "out").mkdir()
    command = [
        "preprocess_data.py",
        "--input",
        tmp_path / "slow.jsonl",
        "--output-prefix",
        tmp_path / "out/o",
        "--workers",
        workers,
    ]
    process = subprocess.Popen(
        [sys.executable, TOOLS / command[0], *map(str, command[1:]), "--tokenizer-type", "ByteTokenizer"],
        stderr=subprocess.PIPE,
        text=True,
    )
    with open(tmp_path / "slow.jsonl", "w") as pipe:
        pipe.write((json.dumps({"text": "word " * 1000}) + "\n") * 400)
        pipe.flush()
        deadline = time.monotonic() + 30
        while not list((tmp_path / "out").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list((tmp_path / "out").iterdir())
        process.send_signal(signal.SIGTERM if workers == 1 else signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.splitlines()[-1] == "error: interrupted; nothing was written"
    assert list((tmp_path / "out").iterdir()) == []


def test_inspect_and_merge(corpus: Path, tmp_path: Path) -> None:
    preprocess([str(corpus)], str(tmp_path / "a"), BYTES)
    prefix = tmp_path / "a_text_document"
    result = tool("inspect_dataset.py", prefix, "--samples", 6, "--seq-length", 8, "--split", "1", "--seed", 3, "--json")
    report = json.loads(result.stdout)
    assert (report["documents"], report["sequences"], report["tokens"]) == (5, 4, 5039 - 3)
    assert report["first_documents"][0]["text"] == "Hello there.<|endoftext|>"
    assert len(report["samples"]) == 6 and all(len(sample) == 9 for sample in report["samples"])
    assert "document 0, 13 tokens: 'Hello there." in tool("inspect_dataset.py", prefix).stdout
    for args, message in {
        (prefix, "--samples", 1): "--seq-length",
        (tmp_path / "b",): "not found",
        (prefix, "--samples", 1, "--seq-length", 4, "--split", "0,1,0"): "leaves no documents for training",
        (prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", 256): "was made with ByteTokenizer",
    }.items():
        wrong = tool("inspect_dataset.py", *args)
        assert wrong.returncode == 2 and message in wrong.stderr and len(wrong.stderr.splitlines()) == 1, wrong.stderr
    joined = tool("merge_datasets.py", "--input", prefix, str(prefix) + ".idx", "--output-prefix", tmp_path / "m")
    assert joined.returncode == 0 and documents(str(tmp_path / "m")) == documents(str(prefix)) * 2
    assert IndexedDataset(str(tmp_path / "m")).meta()["documents"] == 10
    (tmp_path / "nothing").mkdir()
    assert tool("merge_datasets.py", "--input", tmp_path / "nothing", "--output-prefix", tmp_path / "m").returncode == 2


def test_train_tokenizer(corpus: Path, tmp_path: Path) -> None:
    result = tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 270, "--output", tmp_path / "t")
    assert result.returncode == 0 and "with 270 ids" in result.stdout
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    small = tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 5000, "--output", tmp_path / "t")
    assert "warning: the text gives only" in small.stderr
    assert tool("train_tokenizer.py", "--input", corpus, "--vocab-size", 256, "--output", tmp_path / "t").returncode == 2


@pytest.mark.parametrize("train", [train_bpe, partial(train_wordpiece, lower_case=True)], ids=["bpe", "wordpiece"])
def test_train_on_a_long_document(train: Any, tmp_path: Path) -> None:
    """It comes to the trainer in parts, which gives what its halves give: nobody asks a tokenizer that is being trained."""
    words = [f"The {n}th: some, other\u3000words\tand {n * n} more" for n in range(1800)]
    texts = {"whole": [" ".join(words)], "halves": [" ".join(words[:900]), " " + " ".join(words[900:])]}
    assert len(texts["whole"][0]) > MAX_PART > max(map(len, texts["halves"]))
    for name, documents in texts.items():
        file = lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in documents])
        train([str(file)], ["text"], 400, str(tmp_path / name))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "halves" / file.name).read_bytes()


def test_train_wordpiece(corpus: Path, tmp_path: Path) -> None:
    """Every training gives the same file, and the tokenizer that it is for opens it."""
    command = ["train_tokenizer.py", "--tokenizer-type", "BertWordPieceCase", "--input", corpus]
    files = [tmp_path / name / "vocab.txt" for name in "ab"]
    for file in files:
        result = tool(*command, "--vocab-size", 60, "--output", file.parent)
        assert result.returncode == 0 and "vocab.txt with 60 ids" in result.stdout, result.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    pieces = files[0].read_text().splitlines()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(set(pieces)) == 60
    assert max(len(piece.removeprefix("##")) for piece in pieces[5:]) > 2
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="BertWordPieceCase", vocab_file=str(files[0])))
    assert tokenizer.detokenize(tokenizer.tokenize("Hello there.")) == "Hello there."
    for size, message in ((3, "the special tokens"), (20, "this text's characters")):
        wrong = tool(*command, "--vocab-size", size, "--output", tmp_path / "c")
        assert wrong.returncode == 2 and message in wrong.stderr and len(wrong.stderr.splitlines()) == 1, wrong.stderr
