"""Corpora as people have them: packed in any way, under any name, of another kind, and with texts that are none."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import runpy
import tarfile
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.config.schema import TokenizerConfig
from megatron.data.corpus import read_blocks
from megatron.data.encode import PreprocessConfig
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import PreprocessTotals, preprocess
from megatron.data.train_bpe import train_bpe
from megatron.data.train_wordpiece import train_wordpiece

TOOLS = Path(__file__).parents[2] / "tools"
LINES = b"".join(b'{"text": "document %d"}\n' % number for number in range(5000))
BYTES = TokenizerConfig(tokenizer_type="ByteTokenizer")


def zstd(data: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    return packed


def tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        about = tarfile.TarInfo("corpus.jsonl")
        about.size = len(data)
        archive.addfile(about, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("corpus.jsonl", data)
    return buffer.getvalue()


def lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE)


PACKINGS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress, "lzma": lzma_alone}


def read_corpus(file: Path) -> bytes:
    return b"".join(line.text for block in read_blocks([str(file)]) for line in block)


def write_corpus_file(folder: Path, data: bytes | str, name: str = "c.jsonl") -> Path:
    file = folder / name
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def preprocess_beside(file: Path, tokenizer: TokenizerConfig = BYTES, **settings: Any) -> PreprocessTotals:
    """A corpus as datasets beside it."""
    return preprocess([str(file)], str(file.parent / "o"), PreprocessConfig(tokenizer, **settings))


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_under_any_name(packing: str, tmp_path: Path) -> None:
    """The first bytes count, not the name; one packed file may follow another; one that is cut off anywhere is an error."""
    pack = PACKINGS[packing]
    packed = pack(LINES)
    for name in (f"c.jsonl.{packing}", "c.jsonl", "c.jsonl.gz"):
        assert read_corpus(write_corpus_file(tmp_path, packed, name)) == LINES
    if packing != "lzma":
        assert read_corpus(write_corpus_file(tmp_path, pack(LINES[:1000]) + pack(LINES[1000:]))) == LINES
    assert read_corpus(write_corpus_file(tmp_path, gzip.compress(packed))) == LINES
    for size in {0, 1, 3, len(packed) // 2, len(packed) - 9, len(packed) - 1}:
        cut = write_corpus_file(tmp_path, packed[:size], f"cut.jsonl.{packing}")
        with pytest.raises(DataError, match=rf"cut\.jsonl\.{packing}(:1)?: damaged after line \d+ \("):
            read_corpus(cut)
    middle = len(packed) // 2
    with pytest.raises(DataError, match=r"damaged after line \d+"):
        read_corpus(write_corpus_file(tmp_path, packed[:middle] + b"\xff" * 40 + packed[middle + 40 :]))


def test_zeros_between_streams_of_xz(tmp_path: Path) -> None:
    assert read_corpus(write_corpus_file(tmp_path, lzma.compress(LINES) + bytes(8) + lzma.compress(LINES))) == LINES * 2


@pytest.mark.parametrize("pack", [partial(bz2.compress, compresslevel=1), partial(lzma.compress, preset=0)], ids=["bz2", "xz"])
def test_unpacking_takes_bounded_memory(pack: Any, tmp_path: Path) -> None:
    """A small file that stands for much text: a line of it is in memory, and not the rest."""
    line = b'{"text": "' + b"a" * 1_000_000 + b'"}\n'
    file = write_corpus_file(tmp_path, pack(line * 24))
    tracemalloc.start()
    assert sum(len(block) for block in read_blocks([str(file)])) == 24
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000


OTHERS = {
    "a Parquet file": b"PAR1\x15\x04\x15\x10" + bytes(40) + b"PAR1",
    "an Arrow file": b"ARROW1\x00\x00" + bytes(40),
    "an ORC file": b"ORC\x08\x03" + bytes(40),
    "a zip archive": zip_bytes(LINES),
    "a tar archive": tar(LINES),
    "compressed with LZ4": b"\x04\x22\x4d\x18" + bytes(40),
    "text in UTF-16": LINES.decode().encode("utf-16"),
    "UTF-16LE": LINES.decode().encode("utf-16-le"),
    "UTF-16BE": LINES.decode().encode("utf-16-be"),
    "text in UTF-32": LINES.decode().encode("utf-32"),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "an already preprocessed dataset": b"MMIDIDX\x00\x00" + bytes(40),
    "a JSON array, not JSON lines": b'[\n{"text": "a"},\n{"text": "b"}\n]\n',
    "a JSON array": b'\xef\xbb\xbf[{"text": "a"}, {"text": "b"}]',
    "plain text is not accepted": b"ORCs and PAR1 and more\n",
}


@pytest.mark.parametrize("words", OTHERS)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_corpus_is_named(words: str, packed: bool, tmp_path: Path) -> None:
    """For every reader, and within gzip too."""
    file = write_corpus_file(tmp_path, gzip.compress(OTHERS[words]) if packed else OTHERS[words])
    with pytest.raises(DataError, match=words):
        preprocess_beside(file)
    with pytest.raises(DataError, match=words):
        train_bpe([str(file)], ["text"], 300, str(tmp_path / "t"))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_text_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert preprocess_beside(write_corpus_file(tmp_path, "\ufeff" + '{"text": "ab"}\n')).tokens == 2
    for name, data in (("a.txt", "\ufeffword word\n" * 2), ("b.txt", "word word\n" * 2)):
        train_wordpiece([str(write_corpus_file(tmp_path, data, name))], ["text"], 30, str(tmp_path / name[0]), lower_case=False)
    found = [(tmp_path / name / "vocab.txt").read_text(encoding="utf-8") for name in "ab"]
    assert found[0] == found[1] or "\ufeff" not in found[0].splitlines()[5]


def test_plain_text_in_utf_16(tmp_path: Path) -> None:
    """UTF-16 is told from UTF-8, in which it would be text too, with a zero after each letter."""
    for form in ("utf-16-le", "utf-16-be", "utf-16"):
        file = write_corpus_file(tmp_path, "words and words\n".encode(form), "a.txt")
        with pytest.raises(DataError, match=r"a\.txt: it is text in UTF-16, not UTF-8; convert it: `iconv"):
            train_bpe([str(file)], ["text"], 300, str(tmp_path / "t"))


def test_numbers_of_any_size_are_json(tmp_path: Path) -> None:
    """But a number is not text."""
    assert preprocess_beside(write_corpus_file(tmp_path, '{"text": "ab", "id": ' + "7" * 5000 + "}\n")).tokens == 2
    with pytest.raises(DataError, match="'text' is not text but a number"):
        preprocess_beside(write_corpus_file(tmp_path, '{"text": ' + "7" * 5000 + "}\n"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": ["a", "b"]}', "not text but a list"),
        ('{"text": {"a": 1}}', "not text but an object"),
        ('{"text": null}', "not text but null"),
        ('{"text": true}', "not text but true or false"),
        ('{"meta": {"text": "inside"}}', "the one within 'meta' is not read: `jq -c .meta` lifts it out"),
        ('{"content": "x"}', r"no key 'text' \(the keys are: 'content'\)"),
        ('"text"', "text in JSON, not an object with the key 'text'"),
        ("[" * 9, "a JSON array|not JSON"),
        (r'{"text": "\ud83d"}', "half of a surrogate pair"),
        ('{"text": "a" "b"}', "not JSON"),
    ],
)
def test_one_policy_for_bad_lines(line: str, words: str, tmp_path: Path) -> None:
    """Named with file and line, or skipped and kept aside."""
    file = write_corpus_file(tmp_path, f'{{"text": "ab"}}\n{line}\n{{"text": "cd"}}\n')
    with pytest.raises(DataError, match=rf"c\.jsonl:2: .*({words}).*--on-bad-line=skip"):
        preprocess_beside(file)
    totals = preprocess_beside(file, skip_bad_lines=True)
    assert (totals.documents, totals.tokens, totals.bad) == (2, 4, 1)
    assert (tmp_path / "o.bad.jsonl").read_text().strip() == line


@pytest.mark.parametrize("text", ["1 b 3", "1 100", "1 101", "-1", "1.5", "1_0", "\u0663", "9" * 5000])
def test_bad_text_of_the_null_tokenizer(text: str, tmp_path: Path) -> None:
    numbers = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=99)
    file = write_corpus_file(tmp_path, "".join(json.dumps({"text": t}) + "\n" for t in ("1 2", text, "98 99")))
    with pytest.raises(DataError, match=r"c\.jsonl:2: NullTokenizer.*--on-bad-line=skip"):
        preprocess_beside(file, numbers)
    assert (
        preprocess_beside(file, numbers, skip_bad_lines=True).bad,
        IndexedDataset(str(tmp_path / "o_text_document"))[1].tolist(),
    ) == (
        1,
        [98, 99],
    )


def test_a_text_that_the_tokenizer_gives_up_on_is_a_bad_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.data.tokenizer import ByteTokenizer

    plain, asked = ByteTokenizer.tokenize, []

    def tokenize(self: ByteTokenizer, text: str) -> list[int]:
        asked.append(text)
        if "!" in text:
            raise DataError("gives up")
        return plain(self, text)

    monkeypatch.setattr(ByteTokenizer, "tokenize", tokenize)
    file = write_corpus_file(tmp_path, "".join(json.dumps({"text": t}) + "\n" for t in ("a!", "", "b", "c!", "d")))
    with pytest.raises(DataError, match=r"c\.jsonl:1: gives up; --on-bad-line=skip"):
        preprocess_beside(file)
    totals = preprocess_beside(file, skip_bad_lines=True)
    assert (totals.documents, totals.tokens, totals.bad, totals.empty) == (3, 2, 2, 1)
    file, asked[:] = (
        write_corpus_file(tmp_path, "".join(json.dumps({"text": f"{n}!" if n else "ok"}) + "\n" for n in range(300))),
        [],
    )
    assert preprocess_beside(file, skip_bad_lines=True).bad == 299 and len(asked) < 3 * 300  # not the rest again for each


def test_documents_without_a_token(tmp_path: Path) -> None:
    """Nothing could be trained on them, whatever the key; a few empty ones among others are counted."""
    rows = [{"text": "", "title": "a"}] * 3
    file = write_corpus_file(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    for keys in (("text",), ("title", "text")):
        with pytest.raises(DataError, match=r"no tokens in .*: the texts under the key 'text' of all 3 documents are empty"):
            preprocess_beside(file, keys=keys, append_eod=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    for train in (train_bpe, lambda *args: train_wordpiece(*args, lower_case=True)):
        with pytest.raises(DataError, match=r"no text in .*c\.jsonl"):
            train([str(file)], ["text"], 300, str(tmp_path / "t"))
    assert preprocess_beside(file, keys=("title",)).tokens == 3


def test_a_key_is_named_once(tmp_path: Path) -> None:
    file = write_corpus_file(tmp_path, LINES)
    for keys in (("text", "text"), ("a", "text", "a")):
        with pytest.raises(DataError, match=r"--json-keys .* is given 2 times"):
            preprocess_beside(file, keys=keys)
        with pytest.raises(DataError, match=r"--json-keys .* is given 2 times"):
            train_bpe([str(file)], keys, 300, str(tmp_path / "t"))


def test_the_tool_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TOOLS / "preprocess_data.py"))["main"]
    command = ["--input", str(write_corpus_file(tmp_path, LINES)), "--output-prefix", str(tmp_path / "o"), "--tokenizer-type"]
    assert main([*command, "ByteTokenizer", "--append-eod", "--bos-token", "0", "--eod-token", "10"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "end of document: 'Ċ' (id 10), appended to each document"
    assert out[1] == "first token: 'Ā' (id 0), put before each document"
    assert out[2] == "special tokens in the text: ByteTokenizer recognizes none, so everything is plain text"
    assert IndexedDataset(str(tmp_path / "o_text_document"))[0].tolist() == [0, *b"document 0", 10]
