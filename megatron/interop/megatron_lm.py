"""Megatron-LM's own checkpoints: their names, their cut over tensor- and pipeline-parallel ranks, in both directions.

    iter_0000100/mp_rank_01_002/model_optim_rng.pt     tensor-parallel rank 1 of pipeline stage 2; mp_rank_01 without stages

A file holds a nested dictionary, `model` in it the weights (`model0`, `model1`, ... of virtual stages), layers counted from 0
on each. One row of the table below says which of our tensors is which of theirs, and along which dimension ranks cut it.
Where ours are cut differently, a form says how: queries, keys and values were ordered in three ways over the years, and the
gate of a SwiGLU lies in one matrix with what it gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.config.option import MAX_TOKENS
from megatron.interop.soundness import refuse_unsound

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """ours, theirs: names; `{n}` stands for the layer's number. cut: the dimension that ranks cut; None: a copy each.

    rows: the rows are tokens, and padded to the same number on every rank.
    """

    ours: str
    theirs: str
    cut: int | None = None
    rows: bool = False


def _both(ours: str, theirs: str, cut: int | None = None) -> tuple[Entry, Entry]:
    """Weight and bias; where input features are cut, the bias is a copy each."""
    return Entry(f"{ours}.weight", f"{theirs}.weight", cut), Entry(f"{ours}.bias", f"{theirs}.bias", 0 if cut == 0 else None)


TABLE = (
    Entry("embedding.word.weight", "language_model.embedding.word_embeddings.weight", 0, rows=True),
    Entry("embedding.position.weight", "language_model.embedding.position_embeddings.weight"),
    Entry("embedding.segment.weight", "language_model.embedding.tokentype_embeddings.weight"),
    *_both("layers.{n}.input_norm", "language_model.encoder.layers.{n}.input_layernorm"),
    *_both("layers.{n}.attention.qkv", "language_model.encoder.layers.{n}.self_attention.query_key_value", 0),
    *_both("layers.{n}.attention.dense", "language_model.encoder.layers.{n}.self_attention.dense", 1),
    *_both("layers.{n}.mlp_norm", "language_model.encoder.layers.{n}.post_attention_layernorm"),
    *_both("layers.{n}.mlp.up", "language_model.encoder.layers.{n}.mlp.dense_h_to_4h", 0),
    *_both("layers.{n}.mlp.down", "language_model.encoder.layers.{n}.mlp.dense_4h_to_h", 1),
    *_both("final_norm", "language_model.encoder.final_layernorm"),
    Entry("head.weight", "language_model.output_layer.weight", 0, rows=True),
    *_both("pooler", "language_model.pooler.dense"),
    *_both("masked_words.dense", "lm_head.dense"),
    *_both("masked_words.norm", "lm_head.layernorm"),
    Entry("masked_words.bias", "lm_head.bias", 0, rows=True),
    *_both("order", "binary_head"),
)
COPY = "word_embeddings_for_head.weight"  # the last stage's, of a tied matrix that the first stage holds
BUFFERS = ("rotary_pos_emb.inv_freq", ".self_attention.bias", ".masked_bias")  # constants that older versions saved
OLDER_NAMES = (("language_model.transformer.", "language_model.encoder."), (".attention.", ".self_attention."))


@dataclass(frozen=True)
class Sizes:
    """What the forms must know of a model. swiglu: whether the MLP has a gate."""

    heads: int
    groups: int
    head_dim: int
    swiglu: bool = False


def flatten(state: Mapping[str, Any], prefix: str = "") -> Weights:
    """The tensors of a nested dictionary under dotted names, in the spelling of the table."""
    found: Weights = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            name = f"{prefix}{key}"
            for old, new in OLDER_NAMES:
                name = name.replace(old, new)
            found[name] = value
    return found


def chunks_of(file: Mapping[str, Any], name: str) -> list[Weights]:
    """The weights of each virtual stage of one rank's file, of one without them the only one. CheckpointError without any."""
    keys = (
        ["model"]
        if "model" in file
        else sorted((k for k in file if re.fullmatch(r"model\d+", str(k))), key=lambda k: int(k[5:]))
    )
    if not keys or any(not isinstance(file[key], Mapping) for key in keys):
        raise CheckpointError(f"{name}: it has no `model` with weights in it, so it is no checkpoint of Megatron-LM")
    return [flatten(file[key]) for key in keys]


def join(stages: Sequence[Sequence[Weights]], sizes: Sizes, version: float) -> Weights:
    """All weights of a model under our global names.

    stages: in the model's order, of each stage its tensor-parallel ranks in order. version: the files' checkpoint_version.
    CheckpointError for a tensor that the table does not know, and for ranks that do not belong together.
    """
    whole: Weights = {}
    before = 0
    for ranks in stages:
        if any(rank.keys() != ranks[0].keys() for rank in ranks):
            raise CheckpointError("the tensor-parallel ranks of a stage hold different tensors; they are of different models")
        layers = 0
        for theirs, first in ranks[0].items():
            if theirs == COPY or theirs.endswith(BUFFERS):
                continue
            place = _entry_of(theirs)
            if place is None and not first.is_floating_point():
                continue  # states of kernels and the like
            if place is None:
                raise CheckpointError(f"{theirs}: this tensor has no place in a GPT or BERT of this program")
            entry, number = place
            layers = max(layers, number + 1)
            ours = entry.ours.format(n=number + before)
            parts = [rank[theirs] for rank in ranks]
            for share in parts:
                refuse_unsound({theirs: share})
            try:
                for part in _named(ours, parts, entry, sizes, version):
                    whole |= part
            except RuntimeError as error:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                raise CheckpointError(f"{theirs}: its shape {shapes} does not fit the model's settings") from error
        before += layers
    return whole


def _named(ours: str, parts: list[Tensor], entry: Entry, sizes: Sizes, version: float) -> Iterator[Weights]:
    """The ranks' parts of one tensor, put together; two of ours where theirs holds a gate as well."""
    if ".mlp.up." in ours and sizes.swiglu:
        for kind, which in (("gate", 0), ("up", 1)):
            yield {ours.replace(".up.", f".{kind}."): torch.cat([part.chunk(2)[which] for part in parts])}
        return
    if ".qkv." in ours:
        parts = [reorder(part, sizes, version) for part in parts]
    if entry.cut is None and any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise CheckpointError(f"{entry.theirs}: its copies on the tensor-parallel ranks differ")
    yield {ours: parts[0] if entry.cut is None else torch.cat(parts, dim=entry.cut)}


def _entry_of(theirs: str) -> tuple[Entry, int] | None:
    """The row of a name, and the layer's number in it, -1 without one; None for a name that no row has."""
    match = re.search(r"\.layers\.(\d+)\.", theirs)
    general = theirs if match is None else theirs.replace(match[0], ".layers.{n}.")
    for entry in TABLE:
        if entry.theirs == general:
            return entry, -1 if match is None else int(match[1])
    return None


def reorder(rows: Tensor, sizes: Sizes, version: float) -> Tensor:
    """Queries, keys and values of one rank, from an older order to that of version 2.0 on, which is ours.

    version 0       [3, heads, head_dim]        version 1.0     [heads, head_dim, 3]        2.0 on      [heads, 3, head_dim]
    """
    if version >= 2.0:
        return rows
    rest, width = rows.shape[1:], sizes.head_dim
    if version >= 1.0:
        return rows.view(-1, width, 3, *rest).transpose(1, 2).reshape(rows.shape)
    return rows.view(3, -1, width, *rest).transpose(0, 1).reshape(rows.shape)


def unpadded(whole: Mapping[str, Tensor], vocab: int) -> Weights:
    """The same weights with the first `vocab` rows of the vocabulary. CheckpointError when there are fewer, or none wanted."""
    if vocab < 1:
        raise CheckpointError(f"a vocabulary of {vocab} tokens; it must have one at least")
    names = {entry.ours for entry in TABLE if entry.rows} & whole.keys()
    if short := sorted(name for name in names if whole[name].shape[0] < vocab):
        raise CheckpointError(
            f"{short[0]} has {whole[short[0]].shape[0]} rows, fewer than the {vocab} tokens of the vocabulary"
        )
    return {name: tensor[:vocab].clone() if name in names else tensor for name, tensor in whole.items()}


def resized(whole: Mapping[str, Tensor], vocab: int) -> Weights:
    """The same weights with `vocab` rows of the vocabulary: the first ones, or all and new ones that are the mean of them.

    CheckpointError when none is wanted. A mean row is what the model expects of a word on average, so new tokens neither
    stand out nor have a logit of 0, which many models seldom give a true word.
    """
    names = {entry.ours for entry in TABLE if entry.rows} & whole.keys()
    rows = min((whole[name].shape[0] for name in names), default=0)
    if vocab <= rows:
        return unpadded(whole, vocab)
    if vocab > MAX_TOKENS:
        raise CheckpointError(f"a vocabulary of {vocab:,} tokens, which makes no sense: it may have at most {MAX_TOKENS:,}")

    def grown(old: Tensor) -> Tensor:
        mean = old.double().mean(dim=0, keepdim=True).to(old.dtype)
        return torch.cat([old, mean.expand(vocab - old.shape[0], *old.shape[1:])])

    return {name: grown(tensor) if name in names else tensor for name, tensor in whole.items()}


def split(
    whole: Mapping[str, Tensor], tp: int, stages: Sequence[range], padded: int, *, tied: bool
) -> list[list[dict[str, Any]]]:
    """The nested dictionaries of all files: of each pipeline stage, of each tensor-parallel rank. The inverse of `join`.

    stages: the layers of each stage. padded: rows of the vocabulary, which tp divides. tied: the last of several stages holds a
    copy of the embedding.
    """
    return [
        [_rank(whole, layers, tp, rank, padded, first=s == 0, last=s == len(stages) - 1, tied=tied) for rank in range(tp)]
        for s, layers in enumerate(stages)
    ]


def _rank(
    whole: Mapping[str, Tensor], layers: range, tp: int, rank: int, padded: int, *, first: bool, last: bool, tied: bool
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for entry in TABLE:
        if "{n}" not in entry.ours and not (first if entry.ours.startswith("embedding.") else last):
            continue
        for place, number in enumerate(layers) if "{n}" in entry.ours else [(0, 0)]:
            ours = entry.ours.format(n=number)
            if ours in whole:
                _put(made, entry.theirs.format(n=place), _cut(whole, ours, entry, tp, rank, padded))
    if tied and last and not first:
        entry = TABLE[0]
        made["word_embeddings_for_head"] = {"weight": _cut(whole, entry.ours, entry, tp, rank, padded)}
    return made


def _cut(whole: Mapping[str, Tensor], ours: str, entry: Entry, tp: int, rank: int, padded: int) -> Tensor:
    """One rank's part of a tensor."""
    tensor, gate = whole[ours], whole.get(ours.replace(".up.", ".gate.")) if ".mlp.up." in ours else None
    if entry.rows:
        # Copies of the last row, as Megatron-LM grows a vocabulary: rows of zeros would be tokens of logit 0, which some models
        # find likelier than any true one, and Megatron-LM's softmax counts them.
        tensor = torch.cat([tensor, tensor[-1:].expand(padded - tensor.shape[0], *tensor.shape[1:])])
    if entry.cut is None:
        return tensor.clone()
    part = tensor.chunk(tp, dim=entry.cut)[rank]
    return torch.cat([gate.chunk(tp)[rank], part]) if gate is not None else part.clone()


def _put(made: dict[str, Any], theirs: str, tensor: Tensor) -> None:
    """Into the nested dictionary, as deep as Megatron-LM's modules are; what follows stays one dotted key."""
    path, last = _path(theirs)
    for step in path:
        made = made.setdefault(step, {})
    made[last] = tensor


def _path(theirs: str) -> tuple[list[str], str]:
    for parent in ("language_model.encoder", "language_model.pooler", "language_model.output_layer", "lm_head", "binary_head"):
        if theirs.startswith(parent + "."):
            return parent.split("."), theirs.removeprefix(parent + ".")
    *path, last = theirs.split(".")
    return path, last
