"""Tokens that end and begin documents, and special tokens that stand in texts, for every kind of tokenizer."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from recipes import write_corpus
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron.config.schema import DataConfig, DataSettings, TokenizerConfig
from megatron.data import matching
from megatron.data.build import build_datasets
from megatron.data.encode import PreprocessConfig
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.matching import adopt_dataset_roles, check_tokenizer
from megatron.data.merge import merge_datasets
from megatron.data.preprocess import preprocess
from megatron.data.tokenizer import build_tokenizer, load_tokenizer
from megatron.data.tokenizer_base import Tokenizer as Ours
from megatron.data.train_bpe import train_bpe

TEXT = "so <|endoftext|> it [MASK] is <EOD> here"
# The kind of tokenizer, what --eod-token and --bos-token name, their ids, and the special tokens that are found in TEXT.
KINDS = {
    "GPT2BPETokenizer": ("<|endoftext|>", "10", [269, 10], {"<|endoftext|>": 1}),
    "BertWordPieceCase": ("[SEP]", "[CLS]", [3, 2], {"[MASK]": 1}),
    "BertWordPieceLowerCase": ("[EOS]", "[BOS]", [11, 10], {"[MASK]": 1}),
    "SentencePieceTokenizer": ("<SEP>", "<s>", [77, 1], {"<EOD>": 1}),
    "GPTSentencePieceTokenizer": ("<s>", "</s>", [1, 2], {}),
    "HuggingFaceTokenizer": ("here", "<EOD>", [3, 5], {"<EOD>": 1, "<|endoftext|>": 1}),
    "ByteTokenizer": ("256", "10", [256, 10], {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "c.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    train_bpe([str(folder / "c.jsonl")], ["text"], 270, str(folder / "bpe"))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nso\nit\nis\nhere\nMASK\n")
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 9), model_writer=buffer, vocab_size=80, model_type="bpe", hard_vocab_limit=False,
        minloglevel=2, pad_id=-1,
    )  # fmt: skip
    (folder / "sp.model").write_bytes(buffer.getvalue())
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "so": 1, "is": 2, "here": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in ("<|endoftext|>", "<EOD>")])
    (folder / "hf").mkdir()
    words.save(str(folder / "hf/tokenizer.json"))
    return folder


def config(kind: str, files: Path, **more: Any) -> TokenizerConfig:
    model = files / ("hf" if kind.startswith("Hugging") else "sp.model")
    vocab = files / ("vocab.txt" if kind.startswith("Bert") else "bpe/vocab.json")
    return TokenizerConfig(kind, str(vocab), str(files / "bpe/merges.txt"), str(model), **more)


def documents(files: Path, folder: Path, tokenizer: TokenizerConfig, **settings: Any) -> tuple[IndexedDataset, dict[str, int]]:
    totals = preprocess([str(files / "c.jsonl")], str(folder / "o"), PreprocessConfig(tokenizer, append_eod=True, **settings))
    return IndexedDataset(totals.prefixes[0]), dict(totals.special_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_flags_choose_the_ends_of_documents(kind: str, files: Path, tmp_path: Path) -> None:
    """The tokens that flags name end and begin a document, lie in the sidecar, and go with the tokenizer into checkpoints."""
    eod, bos, ids, _ = KINDS[kind]
    plain = build_tokenizer(config(kind, files))
    chosen = config(kind, files, eod_token=eod, bos_token=bos)
    dataset, _ = documents(files, tmp_path, chosen)
    assert dataset[0].tolist() == [ids[1], *plain.tokenize(TEXT), ids[0]]
    tokenizer = build_tokenizer(chosen)
    assert [tokenizer.eod, tokenizer.special["bos"]] == ids == [dataset.meta()["eod"], dataset.meta()["special"]["bos"]]
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.special, saved.chosen, saved.digest()) == (
        tokenizer.special,
        dict(eod=ids[0], bos=ids[1]),
        tokenizer.digest(),
    )
    check_tokenizer(dataset, saved)
    for wrong in ("<no such>", str(plain.vocab_size), ""):
        with pytest.raises(DataError, match="--eod-token"):
            build_tokenizer(config(kind, files, eod_token=wrong))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_texts(kind: str, files: Path, tmp_path: Path) -> None:
    """They are counted, and get their ids or none of a special token."""
    met, tokenizer = KINDS[kind][3], build_tokenizer(config(kind, files))
    special = {tokenizer.special_in_text[mark] for mark in met}
    end = config(kind, files, eod_token="0")  # not among them
    with_ids, counted = documents(files, tmp_path, end)
    assert counted == met and special <= set(with_ids[0].tolist())
    as_text, counted = documents(files, tmp_path, end, plain_special_tokens=True)
    assert counted == met and not special & set(as_text[0].tolist())
    assert as_text.meta()["special_tokens_in_text"] == "plain"
    if not met:
        assert as_text[0].tolist() == with_ids[0].tolist()


def test_where_there_is_no_plain_text(files: Path, tmp_path: Path) -> None:
    """A model with symbols of its own in texts, one whose vocabulary has the mark itself as a word, and numbers."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 9), model_writer=buffer, vocab_size=80, model_type="bpe", hard_vocab_limit=False,
        minloglevel=2, user_defined_symbols=["<mask>", "\u2581\u2581"],
    )  # fmt: skip
    (tmp_path / "sp.model").write_bytes(buffer.getvalue())
    symbols = config("SentencePieceTokenizer", tmp_path)
    assert (
        "<mask>" in build_tokenizer(symbols).special_in_text and "\u2581\u2581" not in build_tokenizer(symbols).special_in_text
    )
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "</s>ab ")], 0))
    unigram.add_special_tokens(["</s>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    word = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json"))
    numbers = TokenizerConfig("NullTokenizer", vocab_size=9)
    for tokenizer, words in ((symbols, "itself finds '<mask>'"), (word, "turns '</s>' in a text"), (numbers, "consist of ids")):
        with pytest.raises(DataError, match=rf"--special-tokens-in-text plain: .*{words}"):
            documents(files, tmp_path, tokenizer, plain_special_tokens=True)


def test_tokenizers_that_differ_in_special_tokens(files: Path, tmp_path: Path) -> None:
    """Told apart in words, with the flag that helps; what a flag chose for the data alone counts for the run."""
    kind = "HuggingFaceTokenizer"
    own, other = config(kind, files), config(kind, files, eod_token="<EOD>")
    dataset, _ = documents(files, tmp_path, own)
    with pytest.raises(DataError) as caught:
        check_tokenizer(dataset, build_tokenizer(other))
    said = str(caught.value)
    assert "was made with a HuggingFaceTokenizer of the same vocabulary but other special tokens: the end of" in said
    assert "is '<|endoftext|>' (id 4) in the dataset and '<EOD>' (id 5) in this run; give --eod-token 4" in said
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/tokenizer.json").write_bytes((files / "hf/tokenizer.json").read_bytes())
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({"pad_token": "<EOD>"}))
    with pytest.raises(DataError, match=r"pad is none in the dataset and '<EOD>' \(id 5\) in this run; use the"):
        check_tokenizer(dataset, build_tokenizer(config(kind, tmp_path)))
    (tmp_path / "other").mkdir()
    first, (dataset, _) = dataset, documents(files, tmp_path / "other", other)
    with pytest.raises(DataError, match=r"end of document 4\).*end of document 5\); they differ only in special tokens"):
        merge_datasets([first.prefix, dataset.prefix], str(tmp_path / "m"))
    tokenizer, data = build_tokenizer(own), DataSettings(data_path=(dataset.prefix,))
    settings, lines = adopt_dataset_roles(data, own, tokenizer)
    assert settings.eod_token == "5" and tokenizer.eod == 5 and "'<EOD>' (id 5), as chosen by --eod-token" in lines[0]
    check_tokenizer(dataset, tokenizer)
    tokenizer = build_tokenizer(config(kind, files, eod_token="4"))
    assert adopt_dataset_roles(data, config(kind, files, eod_token="4"), tokenizer)[1] == [] and tokenizer.eod == 4


def test_a_chosen_end_is_in_the_export(files: Path, tmp_path: Path) -> None:
    tokenizer: Ours = build_tokenizer(config("GPT2BPETokenizer", files, eod_token="10"))
    tokenizer.hf_files(tmp_path, 64)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == tokenizer.piece(10)


@pytest.mark.parametrize("place", [0, 77, 79])
def test_foreign_ids_without_a_sidecar(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when the data are opened: all of a small dataset is looked at, the ends and parts of a large one."""
    sizes = [7, 0, 60, 13]
    rows = np.arange(80, dtype=np.uint16)
    rows[place] = 60_000
    cuts = np.cumsum([0, *sizes])
    parts = [[rows[a:b]] for a, b in itertools.pairwise(cuts)]
    prefix = write_corpus(tmp_path / "bad", parts)
    document = int(np.searchsorted(cuts, place, side="right")) - 1
    words = rf"bad\.bin, document {document}, token {place - cuts[document]}: id 60000 is outside of the vocabulary of 257 ids"
    byte = build_tokenizer(TokenizerConfig("ByteTokenizer"))
    data = DataConfig(data_path=(prefix,), split="1,0,0", seq_length=8)
    with pytest.raises(DataError, match=words):
        build_datasets(data, 1, (4, 0, 0), byte)
    monkeypatch.setattr(matching, "MAX_CHECKED_TOKENS", 16)
    monkeypatch.setattr(matching, "CHECKED_PIECE", 4)
    with pytest.raises(DataError, match=words):
        build_datasets(data, 1, (4, 0, 0), byte)


@pytest.mark.parametrize(
    ("name", "kind"), [("tokenizer.model", "GPTSentencePiece"), ("merges.txt", "GPT2BPE"), ("vocab.txt", "BertWord")]
)
def test_a_directory_with_an_older_form(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"has no tokenizer\.json but an older form: give --tokenizer-type {kind}.*{name}"):
        build_tokenizer(TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path)))
