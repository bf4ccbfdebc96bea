"""Every reader of files against what a file can be instead: each answers at once, in words that name it, or reads rightly.

A row for each file that somebody else may have made and its reader, a column for each thing that may stand in its place. A
reader that waits or fills the memory is stopped by an alarm and by a limit of the process's memory.
"""

from __future__ import annotations

import gzip
import json
import resource
import runpy
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import toys
import zstandard
from safetensors.torch import save_file
from sharded_state import save_on_ranks
from stand_ins import STAND_INS, make_stand_in

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CheckpointError, read_config, read_manifest, read_state, verify
from megatron.checkpoint.load import read_tensor
from megatron.config.command_line.data_args import expand_data_args
from megatron.config.command_line.toml_file import read_toml
from megatron.config.errors import ConfigError
from megatron.config.schema import TokenizerConfig
from megatron.data import corpus
from megatron.data.errors import DataError
from megatron.data.hugging_face import read_hf_tokenizer
from megatron.data.index_cache import load_arrays as load_index
from megatron.data.index_cache import write_arrays
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.tokenizer import ByteTokenizer, build_tokenizer, load_tokenizer
from megatron.interop.hf_import import read_hf
from megatron.interop.megatron_files import read_megatron
from megatron.interop.released_archives import read_archive, read_config_file
from megatron.interop.side_files import read_side_files
from megatron.serving.chat_template import ChatFiles
from megatron.tasks.glue import MNLI, PairClassification
from megatron.tasks.race import Race
from megatron.tasks.sources import TextFile
from megatron.tasks.squad import Squad
from megatron.tasks.tagging import Tagging
from megatron.train.progress import Progress

ROOT = Path(__file__).parents[2]
PATIENCE, MEMORY = 10.0, 3 << 30  # seconds for one answer; bytes that a reader may take
REFUSALS = (CheckpointError, DataError, ConfigError)
KINDS = (
    "a named pipe",
    "a device",
    "a directory",
    "a socket",
    "not a regular file",
    "outside the checkpoint",
    "has no manifest.json",
)
CLASSES = ("contradiction", "entailment", "neutral")
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Row:
    """file: its path. read: reads it, given the folder of all. harmless: stand-ins that are read and mean something."""

    file: str
    read: Read
    harmless: frozenset[str] = frozenset()


def toml(folder: Path) -> None:
    if problems := read_toml(str(folder / "run.toml")).problems:
        raise ConfigError(problems)


def data_paths(name: str) -> Read:
    setting = "data.data_args_path" if name.endswith(".txt") else "data.per_split_data_args_path"

    def read(folder: Path) -> None:
        if problems := expand_data_args({setting: str(folder / name)}, check_datasets=False)[1]:
            raise ConfigError(problems)

    return read


def metrics(folder: Path) -> object:
    tool = runpy.run_path(str(ROOT / "tools" / "plot_metrics.py"))
    try:
        return tool["read_losses"](folder / "metrics.jsonl")
    except tool["MetricsError"] as error:
        raise DataError(str(error)) from error


def prompts(folder: Path) -> object:
    try:
        return runpy.run_path(str(ROOT / "tools" / "generate.py"))["read_prompts"](folder / "prompts.txt")
    except ValueError as error:
        raise DataError(str(error)) from error


def lines(name: str) -> Read:
    return lambda folder: [line for block in corpus.read_blocks([str(folder / name)], pipes=True) for line in block]


def tokenizer(kind: str, **files: str) -> Read:
    return lambda folder: build_tokenizer(TokenizerConfig(kind, **{flag: str(folder / f) for flag, f in files.items()}))


def task(kind: Any, path: str, *more: Any) -> Read:
    def read(folder: Path) -> object:
        words = build_tokenizer(TokenizerConfig("BertWordPieceLowerCase", vocab_file=str(folder / "words.txt")))
        return kind(words, 64, *more).read(str(folder / path), training=True)

    return read


def checkpoint(folder: Path) -> object:
    """Everything that is read of a checkpoint."""
    directory = find_checkpoint(folder / "run")
    manifest = verify(directory)
    read_config(directory), read_state(directory)
    return [read_tensor(directory, manifest, name) for name in manifest.tensors]


def unverified(folder: Path) -> object:
    directory = folder / "run" / "iter_0000100"
    manifest = read_manifest(directory)
    return [read_tensor(directory, manifest, name) for name in manifest.tensors]


def index(folder: Path) -> object:
    found = load_index(folder / "index")
    if found is None:  # then it is built anew
        raise DataError("index")
    return found


def progress(folder: Path) -> object:
    if Progress(str(folder)).finished is None:
        raise DataError("progress.json")
    return True


def source(folder: Path) -> None:
    """The tokenizers of all directories of Hugging Face's."""
    for name in ("hf", "slow", "pieces", "sentences"):
        read_hf_tokenizer(folder / name)


def kept_files(folder: Path) -> object:
    return read_side_files(folder / "kept", tokenizer=True)


def chat(folder: Path) -> object:
    return ChatFiles.from_directory(folder / "kept", ByteTokenizer())


BPE = dict(vocab_file="bpe/vocab.json", merge_file="bpe/merges.txt")
HF = dict(tokenizer_model="hf")
ANY = frozenset({"empty", "cut"})  # a shorter text is a text, and no text is an error of another kind, or none
ROWS = [
    Row("run.toml", toml, ANY),
    Row("blend.txt", data_paths("blend.txt"), frozenset({"cut"})),
    Row("splits.json", data_paths("splits.json")),
    Row("metrics.jsonl", metrics),
    Row("prompts.txt", prompts, frozenset({"cut"})),
    Row("progress.json", progress),
    *(Row(name, lines(name), ANY) for name in ("c.jsonl", "c.jsonl.gz", "c.jsonl.zst")),
    *(Row(name, lambda folder, name=name: TextFile(str(folder / name)), frozenset({"cut"})) for name in ("t.txt", "t.txt.gz")),
    Row("c.jsonl", lambda folder: TextFile(str(folder / "c.jsonl")), frozenset({"cut"})),
    Row("bpe/vocab.json", tokenizer("GPT2BPETokenizer", **BPE)),
    Row("bpe/merges.txt", tokenizer("GPT2BPETokenizer", **BPE), ANY),
    Row("words.txt", tokenizer("BertWordPieceLowerCase", vocab_file="words.txt"), frozenset({"cut"})),
    Row("hf/tokenizer.json", tokenizer("HuggingFaceTokenizer", **HF)),
    Row("hf/tokenizer_config.json", tokenizer("HuggingFaceTokenizer", **HF)),
    *(Row(place, source) for place in ("hf/tokenizer.json", "hf/tokenizer_config.json", "slow/vocab.json")),
    *(Row(f"slow/{name}", source) for name in ("added_tokens.json", "special_tokens_map.json")),
    *(Row(place, source) for place in ("pieces/tokenizer_config.json", "sentences/tokenizer.model")),
    Row("slow/merges.txt", source, ANY),
    Row("pieces/vocab.txt", source, frozenset({"cut"})),
    *(Row(f"kept/{name}", kept_files, ANY) for name in ("generation_config.json", "chat_template.jinja")),
    *(Row(f"kept/{name}", chat, ANY) for name in ("generation_config.json", "chat_template.jinja")),
    Row("sp.model", tokenizer("SentencePieceTokenizer", tokenizer_model="sp.model")),
    Row("saved/megatron_tokenizer.json", lambda folder: load_tokenizer(folder / "saved")),
    Row("saved/vocab.json", lambda folder: load_tokenizer(folder / "saved")),
    *(Row(f"d.{end}", lambda folder: IndexedDataset(str(folder / "d"))) for end in ("bin", "idx", "meta.json")),
    Row("index/about.json", index),
    Row("index/order.npy", index),
    Row("mnli.tsv", task(PairClassification, "mnli.tsv", MNLI, CLASSES), frozenset({"cut"})),
    Row("race/0.txt", task(Race, "race", tuple("ABCD"))),
    Row("squad.json", task(Squad, "squad.json")),
    Row("conll.txt", task(Tagging, "conll.txt", ("O", "B-PER", "I-PER", "B-OBJ", "I-OBJ")), frozenset({"cut"})),
    Row("hf/config.json", lambda folder: read_hf(folder / "hf")),
    Row("hf/model.safetensors", lambda folder: read_hf(folder / "hf")),
    Row("hf2/model.safetensors.index.json", lambda folder: read_hf(folder / "hf2")),
    Row("hf2/part.safetensors", lambda folder: read_hf(folder / "hf2")),
    Row("meg/latest_checkpointed_iteration.txt", lambda folder: read_megatron(folder / "meg")),
    Row("meg/release/mp_rank_00/model_optim_rng.pt", lambda folder: read_megatron(folder / "meg")),
    Row("meg.zip", lambda folder: read_archive(folder / "meg.zip")),
    Row("meg.pt", lambda folder: read_archive(folder / "meg.pt")),
    Row("config_file.json", lambda folder: read_config_file(folder / "config_file.json")),
    Row("run/latest_checkpointed_iteration.txt", checkpoint, frozenset(STAND_INS)),  # passed over, with a line
    *(Row(f"run/iter_0000100/{name}", checkpoint) for name in ("manifest.json", "config.json", "state.json")),
    *(Row("run/iter_0000100/shard_00000.safetensors", read) for read in (checkpoint, unverified)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file for every row; those of Hugging Face and Megatron-LM as far as they are read here."""
    made = tmp_path_factory.mktemp("good")
    (made / "run.toml").write_text("[model]\nnum-layers = 2\nhidden-size = 64\n")
    (made / "blend.txt").write_text("first second third\n")
    (made / "splits.json").write_text('{"train": ["first", "second"], "valid": ["third"]}')
    (made / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 2.5}\n')
    (made / "prompts.txt").write_text("one\ntwo\n")
    (made / "progress.json").write_text('{"finished": 4}')
    text = "".join(json.dumps({"text": f"tom has a red hat {i}"}) + "\n" for i in range(9)).encode()
    (made / "c.jsonl").write_bytes(text)
    (made / "c.jsonl.gz").write_bytes(gzip.compress(text))
    (made / "c.jsonl.zst").write_bytes(zstandard.compress(text))
    (made / "t.txt").write_bytes(text)
    (made / "t.txt.gz").write_bytes(gzip.compress(text))
    _tokenizers(made)
    with IndexedWriter(str(made / "d"), np.dtype("<u2")) as writer:
        writer.add_document(np.arange(9), [4, 5])
        writer.finish({"tokenizer_type": "ByteTokenizer"})
    write_arrays({"order": np.arange(9)}, made / "index", {"version": 1})
    toys.write_mnli(made / "mnli.tsv", 4, 1)
    toys.write_race(made / "race", 1, 1)
    toys.write_squad(made / "squad.json", 2, 1)
    toys.write_conll(made / "conll.txt", 4, 1)
    _weights(made)
    save_on_ranks(str(made / "run"), 100, 1, 1)
    return made


def _tokenizers(made: Path) -> None:
    words = toys.write_vocabulary(made)
    words.rename(made / "words.txt")
    (made / "bpe").mkdir()
    (made / "bpe" / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (made / "bpe" / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer("GPT2BPETokenizer", **BPE)(made).save(made / "saved")  # type: ignore[attr-defined]
    ByteTokenizer().hf_files(made / "hf", 128)
    sentences = made / "sentences.txt"
    sentences.write_text("tom has a red hat\nit is not blue\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentences), model_prefix=str(made / "sp"), vocab_size=30, minloglevel=9, hard_vocab_limit=False
    )
    shutil.copytree(made / "bpe", made / "slow")
    (made / "slow" / "added_tokens.json").write_text('{"<pad>": 4}')
    (made / "slow" / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    for name in ("pieces", "sentences", "kept"):
        (made / name).mkdir()
    shutil.copy(made / "words.txt", made / "pieces" / "vocab.txt")
    (made / "pieces" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    shutil.copy(made / "sp.model", made / "sentences" / "tokenizer.model")
    (made / "kept" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (made / "kept" / "chat_template.jinja").write_text("{{ messages[0].content }}")


def _weights(made: Path) -> None:
    """A GPT-2 of one layer, in one file and behind an index; and the same sizes as Megatron-LM's."""
    about = dict(model_type="gpt2", vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    shapes = {"wte.weight": (8, 4), "wpe.weight": (8, 4), "ln_f.weight": (4,), "ln_f.bias": (4,)}
    shapes |= {f"h.0.ln_{i}.{kind}": (4,) for i in (1, 2) for kind in ("weight", "bias")}
    shapes |= {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_attn.bias": (12,), "h.0.attn.c_proj.weight": (4, 4)}
    shapes |= {"h.0.attn.c_proj.bias": (4,), "h.0.mlp.c_fc.weight": (4, 16), "h.0.mlp.c_fc.bias": (16,)}
    shapes |= {"h.0.mlp.c_proj.weight": (16, 4), "h.0.mlp.c_proj.bias": (4,)}
    tensors = {f"transformer.{name}": torch.randn(shape) for name, shape in shapes.items()}
    (made / "hf2").mkdir()
    for name in ("hf", "hf2"):
        (made / name / "config.json").write_text(json.dumps(about))
    save_file(tensors, made / "hf" / "model.safetensors")
    save_file(tensors, made / "hf2" / "part.safetensors")
    table = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (made / "hf2" / "model.safetensors.index.json").write_text(json.dumps(table))
    (made / "config_file.json").write_text(json.dumps(about))
    rank = made / "meg" / "release" / "mp_rank_00"
    rank.mkdir(parents=True)
    (made / "meg" / "latest_checkpointed_iteration.txt").write_text("release")
    embedding = {"word_embeddings": {"weight": torch.randn(128, 4)}, "position_embeddings": {"weight": torch.randn(8, 4)}}
    args = dict(num_layers=1, hidden_size=4, num_attention_heads=2, max_position_embeddings=8, padded_vocab_size=128)
    held = {"model": {"language_model": {"embedding": embedding}}, "args": args, "checkpoint_version": 3.0}
    torch.save(held, rank / "model_optim_rng.pt")
    shutil.copy(rank / "model_optim_rng.pt", made / "meg.pt")
    with zipfile.ZipFile(made / "meg.zip", "w") as archive:
        archive.write(made / "meg.pt", "release/mp_rank_00/model_optim_rng.pt")


@contextmanager
def bounded() -> Iterator[None]:
    """An end to waiting, and to memory."""

    def stop(*_: object) -> None:
        raise TimeoutError("it waits, or reads without an end")

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe into which nobody writes is given up at once, and a line is long early."""
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr("megatron.files.regular.open_stream.__defaults__", (0.05,))


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"{i}-{row.file}" for i, row in enumerate(ROWS)])
def test_every_reader_against_what_is_no_file(number: int, folder: Path) -> None:
    row = ROWS[number]
    path = folder / row.file
    good = path.with_name("good " + path.name)
    with bounded():
        row.read(folder)
    path.rename(good)
    try:
        for name in STAND_INS:
            if make_stand_in(name, path, good.read_bytes()):
                with bounded():
                    _answer(row, name, folder)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    finally:
        good.rename(path)
    with bounded():
        row.read(folder)


def _answer(row: Row, name: str, folder: Path) -> None:
    try:
        row.read(folder)
    except REFUSALS as error:
        words = str(error)
    else:
        assert name in row.harmless, f"{row.file} as {name} was read"
        return
    assert Path(row.file).name in words or str(Path(row.file).parent) in words, (name, words)
    assert len(words) < 700 and "Traceback" not in words and "[Errno" not in words, (name, words)
    if name in ("pipe", "device", "directory", "socket") and words not in ("index", "progress.json"):
        assert any(kind in words for kind in KINDS), (name, words)
