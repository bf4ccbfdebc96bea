"""Long texts are cut for the tokenizer, and their tokens are those of the whole text."""

# ruff: noqa: RUF001 - characters that look alike are what tokenizers take apart

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import pages
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megatron.config.schema import TokenizerConfig
from megatron.data import cuts
from megatron.data.cuts import CUT_PATTERNS, Seam, split_text
from megatron.data.encode import PreprocessConfig
from megatron.data.fast_cuts import fast_seam
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import preprocess
from megatron.data.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def isolated_split(expression: str) -> Any:
    return pre_tokenizers.Split(Regex(expression), "isolated")


N, P = normalizers, pre_tokenizers
BYTES, MAPPED = P.ByteLevel(add_prefix_space=False), P.ByteLevel(add_prefix_space=False, use_regex=False)
FORMS: dict[str, tuple[Any, Any, str]] = {  # normalizer, pre-tokenizer, model
    "gpt2": (None, BYTES, "bpe"),
    "roberta": (None, P.ByteLevel(add_prefix_space=True), "bpe"),
    "starcoder": (None, P.Sequence([P.Digits(True), BYTES]), "bpe"),
    "falcon": (
        None,
        P.Sequence([P.Punctuation("contiguous"), BYTES, P.Digits(False), isolated_split("[0-9][0-9][0-9]")]),
        "bpe",
    ),
    "llama3": (None, P.Sequence([isolated_split(GPT4), MAPPED]), "bpe"),
    "qwen": (N.NFC(), P.Sequence([isolated_split(GPT4.replace("{1,3}", "")), MAPPED]), "bpe"),
    "gpt4o": (None, P.Sequence([isolated_split(GPT4O), MAPPED]), "bpe"),
    "deepseek": (
        N.Sequence([]),
        P.Sequence([isolated_split(r"\p{N}{1,3}"), isolated_split("[一-龥぀-ゟ゠-ヿ]+"), isolated_split(DEEPSEEK), MAPPED]),
        "bpe",
    ),
    "bloom": (None, P.Sequence([isolated_split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), MAPPED]), "bpe"),
    "llama2": (N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None, "bpe"),
    "gemma": (N.Replace(" ", "▁"), P.Split(" ", "merged_with_previous"), "bpe"),
    "metaspace": (None, P.Metaspace(prepend_scheme="first", split=False), "bpe"),
    "folding": (
        N.Sequence([N.Nmt(), N.NFKC(), N.Strip(), N.Replace(Regex(" {2,}"), " "), N.Prepend("▁"), N.Replace(" ", "▁")]),
        None,
        "bpe",
    ),
    "nfd": (N.NFD(), BYTES, "bpe"),
    "accents": (N.Sequence([N.NFKD(), N.StripAccents(), N.Lowercase(), N.Strip()]), BYTES, "bpe"),
    "bert": (N.BertNormalizer(lowercase=True), P.BertPreTokenizer(), "wordpiece"),
    "bert-cased": (N.BertNormalizer(lowercase=False), P.BertPreTokenizer(), "wordpiece"),
    "t5": (N.NFKC(), P.Sequence([P.WhitespaceSplit(), P.Metaspace()]), "unigram"),
    "t5-new": (N.NFKC(), P.Metaspace(), "unigram"),
    "nothing": (None, None, "bpe"),
}
WHOLE = ("llama2", "gemma", "metaspace", "folding")  # text is not split, but the vocabulary was made of words
# One looks far to either side, counts characters, or is not known for what it does.
UNKNOWN: dict[str, tuple[Any, Any, str]] = {
    "an expression": (None, isolated_split(r"\w+\s\w+|\s|."), "bpe"),
    "counting": (None, P.FixedLength(5), "bpe"),
    "scripts": (None, P.UnicodeScripts(), "bpe"),
    "bytes first": (N.ByteLevel(), None, "bpe"),
    "a word replaced": (N.Replace("foo bar", "X"), BYTES, "bpe"),
}
TEXTS = [
    *pages(12, 2500),
    "foo bar 中文，文字。 de l'été 123,456 ",
    "x, y. " * 30,
]
PIECES = (
    *(
        "a",
        "b",
        "I",
        "the ",
        "of ",
        "word",
        "foo bar",
        "Foo",
        "bar,",
        "don't",
        "'s",
        "'",
        "we've",
        "x" * 9,
        "ß",
        "İ",
        "é",
        "e\u0301",
    ),
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x00", "\ufeff", "\u200d"),
    *("1", "12", "3456", "1,000.5", "²", "½", "Ⅷ", ".", ",", "...", "!?", "(", ")", "-", "_", "▁", "\u0301", "ﬁ", "Ａ"),
    *("中", "文字", "。", "，", "あ", "🙂", "👨‍👩‍👧", "한", "ᄒ", "ᅡ", "ᆫ", "क्", "षि", "ا", "لا", "\u0600", "\u0e33"),
    *("<s>", "<mask>", "<end>", "a b", "<un", "k>", "<EOD>", "<extra_id_0>"),
)
STRANGE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=40).map("".join)
SPACED = st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map(" ".join)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def train_backend(form: tuple[Any, Any, str], *, added: bool, of_words: bool = False) -> Backend:
    normalizer, splitter, model = form
    options: dict[str, Any] = {"vocab_size": 500, "show_progress": False}
    if model == "bpe":
        backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
        by_bytes = splitter is not None and b"ByteLevel" in splitter.__getstate__()
        letters = pre_tokenizers.ByteLevel.alphabet() if by_bytes else ["▁"]
        trainer: Any = trainers.BpeTrainer(special_tokens=["<unk>"], initial_alphabet=letters, max_token_length=12, **options)
    elif model == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]"], **options)
    else:
        backend = Backend(models.Unigram())
        trainer = trainers.UnigramTrainer(special_tokens=["<unk>"], unk_token="<unk>", **options)
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None or of_words:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never") if of_words else splitter
    backend.train_from_iterator([text[i : i + 200] for text in TEXTS for i in range(0, len(text), 200)], trainer)
    if of_words:
        backend.pre_tokenizer = splitter
    if added:
        strip = [("<s>", {}), ("<mask>", {"lstrip": True}), ("<end>", {"rstrip": True}), ("a b", {"single_word": True})]
        backend.add_special_tokens([AddedToken(name, normalized=False, **how) for name, how in strip])
        backend.add_tokens([AddedToken("Foo", single_word=True), AddedToken("bar,", rstrip=True)])
    return backend


def allowed_cuts(text: str, seam: Seam) -> Iterator[tuple[str, str]]:
    """Every way to cut a text in two that the seam allows."""
    for place in sorted({match.start() for kind in CUT_PATTERNS for match in kind.finditer(text)}):
        skipped = seam.judge(text[max(0, place - seam.context) : place], text[place : place + seam.context])
        if skipped is not None:
            yield text[:place], text[place + skipped :]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_no_cut_changes_the_tokens(name: str, added: bool) -> None:
    backend = train_backend(FORMS[name], added=added, of_words=name in WHOLE)
    seam = fast_seam(backend)
    assert seam is not None

    def ids(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    @QUICK
    @given(STRANGE | SPACED)
    def cut_anywhere(text: str) -> None:
        whole = ids(text)
        for left, right in allowed_cuts(text, seam):
            assert ids(left) + ids(right) == whole, (left, right)

    cut_anywhere()
    plain = TEXTS[0].replace("Foo", "")
    assert len(list(allowed_cuts(plain, seam))) > (0 if name == "nothing" else len(plain) / 200), (
        "ordinary text has places for cuts"
    )


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_not_cut(name: str) -> None:
    assert fast_seam(train_backend(UNKNOWN[name], added=False)) is None


def test_a_merge_across_words_is_not_cut() -> None:
    """A vocabulary with `e▁t` in one piece, of text that is not split into words."""
    backend = Backend(
        models.BPE(vocab={c: i for i, c in enumerate(["t", "h", "e", " ", "e ", "e t"])}, merges=[("e", " "), ("e ", "t")])
    )
    seam = fast_seam(backend)
    assert seam is not None and seam.judge("the", " the") is None and seam.judge("th", " the") == 0
    assert len(backend.encode("the the").ids) < 2 * len(backend.encode("the").ids) + 1


@pytest.fixture(scope="module")
def models_of_pieces() -> dict[str, bytes]:
    found = {}
    for name, options in {
        "bpe": {"model_type": "bpe", "byte_fallback": True},
        "raw": {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        "identity": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "crossing": {"model_type": "bpe", "split_by_whitespace": False},
        "unigram": {"model_type": "unigram"},
    }.items():
        out = io.BytesIO()
        lines = iter(line for text in TEXTS for line in text.split("\n"))
        common = {"vocab_size": 500, "hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 1.0}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **common, **options)
        found[name] = out.getvalue()
    return found


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "SentencePieceTokenizer"])
@pytest.mark.parametrize("name", ["bpe", "raw", "identity", "crossing"])
def test_no_cut_changes_the_pieces(kind: str, name: str, models_of_pieces: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(models_of_pieces[name])
    tokenizer = build_tokenizer(
        TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(tmp_path / "m.model"), vocab_extra_ids=2)
    )
    seam = tokenizer.seam
    assert seam is not None

    @QUICK
    @given(STRANGE | SPACED)
    def cut_anywhere(text: str) -> None:
        whole = tokenizer.tokenize(text)
        for left, right in allowed_cuts(text, seam):
            assert tokenizer.tokenize(left) + tokenizer.tokenize(right) == whole, (left, right)

    cut_anywhere()
    assert len(list(allowed_cuts(TEXTS[0], seam))) > len(TEXTS[0]) / 200


def test_a_unigram_model_is_not_cut(models_of_pieces: dict[str, bytes], tmp_path: Path) -> None:
    """The rounding of a long sum of scores decides between orders that score alike."""
    (tmp_path / "m.model").write_bytes(models_of_pieces["unigram"])
    config = TokenizerConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(tmp_path / "m.model"))
    assert build_tokenizer(config).seam is None


def test_bytes_and_numbers_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "MAX_PART", 16)
    monkeypatch.setattr("megatron.data.tokenizer.MAX_PART", 16)
    text = "".join(PIECES)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteTokenizer"))
    assert [i for part in tokenizer.parts(text) for i in tokenizer.tokenize(part)] == list(text.encode())
    assert list(tokenizer.parts("")) == [""]
    numbers = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000))
    text = "\n".join(" ".join(map(str, range(i, 1000, 7))) for i in range(5))
    found = list(numbers.parts(text))
    assert len(found) > 100 and [i for part in found for i in numbers.tokenize(part)] == numbers.tokenize(text)


def test_parts_are_short_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "MAX_PART", 200)
    seam = fast_seam(train_backend(FORMS["gpt2"], added=False))
    text = TEXTS[0] + "x" * 1000 + TEXTS[1]
    found = list(split_text(text, lambda: seam))
    assert "".join(found) == text and max(map(len, found)) < 1400 and sorted(map(len, found))[-2] <= 200
    assert list(split_text("x" * 1000, lambda: seam)) == ["x" * 1000]


@pytest.mark.parametrize("split", [False, True])
def test_a_dataset_of_long_documents(
    split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as of whole documents, with ends of documents in their places."""
    (tmp_path / "t.json").write_text(train_backend(FORMS["gpt2"], added=True).to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    texts = ["", *TEXTS, " ", "y" * 500, "z" * 450]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t.json"))
    how = PreprocessConfig(config, append_eod=True, split_sentences=split)
    (whole,) = preprocess([str(tmp_path / "c.jsonl")], str(tmp_path / "whole"), how).prefixes
    monkeypatch.setattr(cuts, "MAX_PART", 100)
    monkeypatch.setattr("megatron.data.encode.BATCH_CHARACTERS", 500)
    monkeypatch.setattr("megatron.data.preprocess.UNCUT_NOTE_THRESHOLD", 400)
    totals = preprocess([str(tmp_path / "c.jsonl")], str(tmp_path / "cut"), how)
    assert capsys.readouterr().err.count("a text of 500 characters was tokenized at once") == 1
    assert (totals.empty, totals.longest_part) == (1 if not split else 2, 500)
    for end in (".bin", ".idx"):
        assert Path(totals.prefixes[0] + end).read_bytes() == Path(whole + end).read_bytes()
    lengths = IndexedDataset(whole).lengths
    assert int(np.sum(lengths)) == totals.tokens and (split or len(lengths) == len(texts) - 1)


def test_memory_for_one_long_document(tmp_path: Path) -> None:
    """Twenty times the size of a document of 4 MB is enough; it takes 130 times, tokenized at once."""
    (tmp_path / "t.json").write_text(train_backend(FORMS["gpt2"], added=False).to_str())
    text = re.sub(r"\s+", " ", " ".join(TEXTS))
    text = (text * (4_000_000 // len(text) + 1))[:4_000_000]
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    program = (
        "import resource, sys; sys.path.insert(0, 'tools'); import preprocess_data as p; import megatron.data.tokenizer;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; p.main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    flags = ["--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "o", "--tokenizer-type", "HuggingFaceTokenizer"]
    command = [sys.executable, "-c", program, *map(str, flags), "--tokenizer-model", str(tmp_path / "t.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    assert int(result.stdout.split()[-1]) * 1024 < 20 * len(text), result.stdout
