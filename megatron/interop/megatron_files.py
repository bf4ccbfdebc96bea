"""Read and write Megatron-LM's directories of checkpoints, in which each rank has a file.

    latest_checkpointed_iteration.txt               a number, or `release`
    iter_0000100/mp_rank_01/model_optim_rng.pt      tensor-parallel rank 1, where there is one pipeline stage
    iter_0000100/mp_rank_01_002/model_optim_rng.pt  of pipeline stage 2
    release/mp_rank_00/...                          weights that were published

With virtual stages a file holds `model0`, `model1`, ...: the model's layers begin with `model0` of every pipeline rank, in the
order of ranks, followed by `model1` of every rank, and so on.
"""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.layout import MAX_TRACKER_BYTES, TRACKER, CheckpointError, directory_name, iteration_directories
from megatron.checkpoint.storage import Storage
from megatron.config.schema import ModelConfig
from megatron.files.foreign import why_not_weights
from megatron.files.outputs import holds_other_files
from megatron.files.pending import PendingDirectory, write_whole
from megatron.files.regular import error_reason, read_text
from megatron.interop.foreign_values import check_megatron_args
from megatron.interop.megatron_args import args_from_config, config_from_args, even_stages, unsupported_by_megatron
from megatron.interop.megatron_tensors import (
    MEGATRON_TENSORS,
    TIED_COPY,
    LayerSizes,
    Weights,
    cut_vocabulary,
    join_ranks,
    split_over_ranks,
    virtual_stages_in_file,
)
from megatron.interop.safe_pickle import InertObject, read_pickled
from megatron.interop.weight_checks import zero_matrices
from megatron.parallel.embedding import padded_vocab_size

# The first contains the optimizer too; the second is written when a distributed optimizer has its own files.
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
RANK_DIRECTORY = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
WRITTEN_VERSION = 3.0  # checkpoint_version of the files that are written


@dataclass(frozen=True)
class ImportedModel:
    """The model in a checkpoint of Megatron-LM.

    Attributes:
        config: the resolved configuration.
        weights: the whole tensors under our global names.
        iteration: the checkpoint's iteration, 0 if the file does not contain it.
        notes: lines for the user about assumptions that were made.
        directory: the directory whose mp_rank_ directories were read.
    """

    config: ModelConfig
    weights: Weights
    iteration: int
    notes: tuple[str, ...]
    directory: Path


def find_rank_directories(root: Path) -> Path:
    """Return the directory that holds mp_rank_ directories: `root`, or the one that its tracker names.

    CheckpointError if neither holds any.
    """
    if (reason := why_not_weights(root, "Megatron-LM")) is not None:
        raise CheckpointError(f"{root}: {reason}")
    if any(RANK_DIRECTORY.fullmatch(path.name) for path in root.iterdir()):
        return root
    try:
        text = read_text(root / TRACKER, MAX_TRACKER_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error_reason(error)
        raise CheckpointError(f"{root}: it holds neither mp_rank_ directories nor a readable {TRACKER}: {reason}") from error
    if text != "release" and not (text.isdecimal() and len(text) < 16):
        raise CheckpointError(f"{root / TRACKER}: expected a number or `release`, found {text[:40]!r}")
    named = root / (text if text == "release" else directory_name(int(text)))
    if not named.is_dir() or not any(RANK_DIRECTORY.fullmatch(path.name) for path in named.iterdir()):
        raise CheckpointError(f"{named}: {TRACKER} names it, but there is no mp_rank_ directory in it")
    return named


def rank_files(directory: Path) -> list[list[Path]]:
    """Return the file of each tensor-parallel rank of each pipeline stage. CheckpointError if one is missing."""
    file_by_rank: dict[tuple[int, int], Path] = {}  # by pipeline stage and tensor-parallel rank
    for path in directory.iterdir():
        if match := RANK_DIRECTORY.fullmatch(path.name):
            files = [path / name for name in RANK_FILES if os.path.lexists(path / name)]
            if not files and os.path.lexists(path / "optim.pt"):
                reason = "it was saved by Megatron-LM's distributed optimizer, whose optim.pt is not read"
                raise CheckpointError(f"{directory}: {reason}; save it in Megatron-LM without --use-distributed-optimizer")
            if not files:
                raise CheckpointError(f"{path}: there is no {RANK_FILES[0]} in it")
            if file_by_rank.setdefault((int(match[2] or 0), int(match[1])), files[0]) != files[0]:
                raise CheckpointError(f"{directory}: it holds one rank twice, with and without a stage in its name")
    pp, tp = (1 + max(rank[axis] for rank in file_by_rank) for axis in (0, 1))
    if missing := next(((p, t) for p in range(pp) for t in range(tp) if (p, t) not in file_by_rank), None):
        p, t = missing
        raise CheckpointError(
            f"{directory}: tensor-parallel rank {t} of pipeline stage {p} is missing; {tp} x {pp} ranks were saved"
        )
    return [[file_by_rank[p, t] for t in range(tp)] for p in range(pp)]


def args_in_file(file: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings in a file that are numbers, strings, lists or tuples; empty if the file has no args.

    CheckpointError for a size that is too large for any model.
    """
    args = file.get("args")
    values = args.attributes() if isinstance(args, InertObject) else args if isinstance(args, Mapping) else {}
    plain = {str(name): value for name, value in values.items() if isinstance(value, bool | int | float | str | list | tuple)}
    check_megatron_args(plain, "the file's args")
    return plain


def checkpoint_version(file: Mapping[str, Any], name: str) -> float:
    """Return the file's checkpoint_version, 0 if it does not contain one. CheckpointError for an unknown one."""
    version = file.get("checkpoint_version", 0.0)
    if not isinstance(version, int | float) or version not in (0, 1.0, 2.0, 3.0):
        raise CheckpointError(f"{name}: its checkpoint_version is {str(version)[:40]!r}; known are 0, 1.0, 2.0 and 3.0")
    return float(version)


def layer_sizes_from_args(args: Mapping[str, Any]) -> LayerSizes:
    """Return the sizes on which the layout of a layer's tensors depends. CheckpointError if the args lack them."""
    try:
        heads = int(args["num_attention_heads"])
        head_dim = int(args.get("kv_channels") or int(args["hidden_size"]) // heads)
        groups = int(args["num_query_groups"]) if args.get("group_query_attention") else heads
        return LayerSizes(heads, groups, head_dim, bool(args.get("swiglu")))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError("the file's args do not say hidden_size and num_attention_heads") from error


def read_megatron(root: Path, vocab_size: int | None = None) -> ImportedModel:
    """Read the model in a directory of Megatron-LM's checkpoints, with the parts of all ranks joined.

    Args:
        root: a directory of checkpoints, or the directory of one iteration.
        vocab_size: the vocabulary size without padding. By default the one that our own export wrote, or else the padded size,
            with a note.

    Raises:
        CheckpointError: a file or tensor is missing or unknown; the message names it.
    """
    directory = find_rank_directories(root)
    try:
        return _read_ranks(directory, vocab_size)
    except CheckpointError as error:
        raise error if str(directory) in str(error) else CheckpointError(f"{directory}: {error}") from error


def _read_ranks(directory: Path, vocab_size: int | None) -> ImportedModel:
    files = rank_files(directory)
    chunks: list[list[list[Weights]]] = []  # [pipeline rank][tensor-parallel rank][virtual stage]
    args: dict[str, Any] = {}
    iteration, version = 0, WRITTEN_VERSION
    for p, ranks in enumerate(files):
        chunks.append([])
        for t, path in enumerate(ranks):
            file = read_pickled(path, str(path))
            if p == t == 0:
                args, version = args_in_file(file), checkpoint_version(file, str(path))
                iteration = file["iteration"] if type(file.get("iteration")) is int and file["iteration"] >= 0 else 0
            elif checkpoint_version(file, str(path)) != version:
                raise CheckpointError(f"{path}: its checkpoint_version is not that of the other ranks' files")
            chunks[-1].append(virtual_stages_in_file(file, str(path)))
    if not args:
        raise CheckpointError(
            "the files hold no args, so the model's settings are not known; if it is a released archive, "
            "use tools/convert_megatron_gpt2_checkpoint.py or tools/convert_megatron_bert_checkpoint.py"
        )
    _check_layout(args, tp=len(files[0]), pp=len(files))
    if len({len(rank) for ranks in chunks for rank in ranks}) != 1:
        raise CheckpointError("its ranks have different numbers of virtual stages")
    # Virtual stage 0 of every pipeline rank, then virtual stage 1 of every rank, and so on.
    stages = [[rank[v] for rank in ranks] for v in range(len(chunks[0][0])) for ranks in chunks]
    check_tied_copies(stages)
    weights = join_ranks(stages, layer_sizes_from_args(args), version)
    if "embedding.word.weight" not in weights:
        raise CheckpointError("there are no word embeddings in it")
    rows, notes = weights["embedding.word.weight"].shape[0], []
    if vocab_size is None and type(args.get("true_vocab_size")) is int:
        vocab_size = args["true_vocab_size"]
    if vocab_size is None:
        vocab_size = rows
        notes.append(
            f"the vocabulary keeps all {rows} rows, with padding: the files do not contain its true size. Give --vocab-size "
            "or the tokenizer before you continue training"
        )
    config = config_from_args(args, weights, vocab_size)
    notes += [f"{name} is all zeros; was the model saved completely?" for name in zero_matrices(weights)]
    if config.architecture == "bert" and config.activation == "gelu":
        notes.append("Megatron-LM's masked-word head has the exact GELU; here it has the tanh approximation, like the layers")
    return ImportedModel(config, cut_vocabulary(weights, vocab_size), iteration, tuple(notes), directory)


def _check_layout(args: Mapping[str, Any], tp: int, pp: int) -> None:
    """Raise CheckpointError if the numbers of ranks in the args are not those of the directories."""
    sizes = (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp))
    wrong = [(name, args[name], actual) for name, actual in sizes if type(args.get(name)) is int and args[name] != actual]
    if wrong:
        name, expected, actual = wrong[0]
        raise CheckpointError(f"its args say {name} {expected}, but there are directories for {actual}; are some missing?")


def check_tied_copies(stages: Sequence[Sequence[Weights]]) -> None:
    """Raise CheckpointError if the last stage's copy of the tied embedding differs from the first stage's."""
    for first, last in zip(stages[0], stages[-1], strict=True):
        if TIED_COPY in last and not torch.equal(last[TIED_COPY], first.get(MEGATRON_TENSORS[0].megatron, last[TIED_COPY])):
            raise CheckpointError("the last stage's copy of the word embeddings differs from the first stage's: it is damaged")


def write_megatron(
    root: Path,
    iteration: int,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tp: int,
    pp: int,
    tokenizer_type: str | None,
) -> Path:
    """Write `root/iter_<iteration>` for Megatron-LM on tp x pp ranks, then the tracker. Equal weights give equal bytes.

    Args:
        root: the directory of checkpoints.
        iteration: the checkpoint's iteration.
        config: the resolved configuration.
        weights: the whole tensors under our global names.
        tp: the tensor-parallel size.
        pp: the pipeline-parallel size.
        tokenizer_type: Megatron-LM's name of the tokenizer's type, None without a tokenizer.

    Returns:
        The directory that was written.

    Raises:
        CheckpointError: Megatron-LM cannot load the model on these ranks, the directory exists, or `root` holds checkpoints
            that the tracker would hide.
    """
    if obstacles := unsupported_by_megatron(config, tp, pp):
        raise CheckpointError(f"Megatron-LM cannot load this model: {'; '.join(obstacles)}")
    final = root / directory_name(iteration)
    if final.exists():
        raise CheckpointError(f"{final}: it exists already; choose another directory, or remove it")
    if later := [n for n, path in iteration_directories(root).items() if n > iteration or not holds_other_files(path)]:
        listed = ", ".join(map(str, later[-5:]))
        raise CheckpointError(
            f"--save {root} holds checkpoints of iteration {listed}: they are later, or not Megatron-LM's, and the tracker "
            f"there would name iteration {iteration}. Give --save a new directory, or move away what is there"
        )
    rows = padded_vocab_size(config.known_vocab_size, tp, config.make_vocab_size_divisible_by)
    tied = not config.untie_embeddings_and_output_weights
    dtype = str(weights["embedding.word.weight"].dtype).removeprefix("torch.")
    args = args_from_config(config, tp, pp, tokenizer_type, dtype)
    parts = split_over_ranks(weights, tp, even_stages(config.num_layers, pp), rows, tied=tied)
    storage = Storage()
    with PendingDirectory(final, "export_megatron") as pending:
        for p, ranks in enumerate(parts):
            for t, model in enumerate(ranks):
                folder = pending.temporary / (f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}")
                storage.make_directory(folder)
                storage.write(folder / RANK_FILES[0], [_rank_file_bytes(args, iteration, model)])
                storage.sync(folder)
        pending.commit(marked=False)
    storage.sync(root)
    # The tracker comes last, so that it never names files that are not on the disk yet.
    write_whole(root / TRACKER, str(iteration))
    return final


def _rank_file_bytes(args: argparse.Namespace, iteration: int, model: Mapping[str, Any]) -> bytes:
    """Return the bytes of one rank's file, as torch.save writes it. model: the nested dictionary of its weights."""
    buffer = io.BytesIO()
    torch.save({"args": args, "checkpoint_version": WRITTEN_VERSION, "iteration": iteration, "model": model}, buffer)
    return buffer.getvalue()
