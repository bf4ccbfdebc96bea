"""Map the tensors of Megatron-LM's own checkpoints to ours and back: their names, and how ranks split them.

    iter_0000100/mp_rank_01_002/model_optim_rng.pt     tensor-parallel rank 1 of pipeline stage 2; mp_rank_01 without stages

A file holds a nested dictionary, `model` in it the weights (`model0`, `model1`, ... of virtual stages), layers counted from 0
on each. One row of the table below says which of our tensors is which of theirs, and along which dimension ranks cut it.
Two are laid out differently as well: queries, keys and values were ordered in three ways over the years, and the gate of a
SwiGLU lies in one matrix with what it gates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.config.option import MAX_TOKENS
from megatron.interop.weight_checks import refuse_unsound

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class MegatronTensor:
    """One of our tensors in a checkpoint of Megatron-LM; `{n}` in the names stands for the layer's number.

    Attributes:
        native: the name of ours.
        megatron: the name there, nested dictionaries joined by dots.
        split_dim: the dimension that tensor-parallel ranks split; None where each has a copy.
        vocab_rows: whether the rows are tokens, which are padded to the same number on every rank.
    """

    native: str
    megatron: str
    split_dim: int | None = None
    vocab_rows: bool = False


def _weight_and_bias(native: str, megatron: str, split_dim: int | None = None) -> tuple[MegatronTensor, MegatronTensor]:
    """Return the rows of a weight and its bias; where ranks split the input features, each has a copy of the bias."""
    weight = MegatronTensor(f"{native}.weight", f"{megatron}.weight", split_dim)
    return weight, MegatronTensor(f"{native}.bias", f"{megatron}.bias", 0 if split_dim == 0 else None)


# The names of Megatron-LM 23.06; OLDER_NAMES turns those before into them. Weights are [out, in], as ours.
MEGATRON_TENSORS = (
    MegatronTensor(
        "embedding.word.weight", "language_model.embedding.word_embeddings.weight", 0, vocab_rows=True
    ),  # [vocab / tp, hidden]
    MegatronTensor("embedding.position.weight", "language_model.embedding.position_embeddings.weight"),  # [positions, hidden]
    MegatronTensor("embedding.segment.weight", "language_model.embedding.tokentype_embeddings.weight"),
    *_weight_and_bias("layers.{n}.input_norm", "language_model.encoder.layers.{n}.input_layernorm"),
    *_weight_and_bias(
        "layers.{n}.attention.qkv", "language_model.encoder.layers.{n}.self_attention.query_key_value", 0
    ),  # see `reorder_qkv`
    *_weight_and_bias(
        "layers.{n}.attention.dense", "language_model.encoder.layers.{n}.self_attention.dense", 1
    ),  # [hidden, heads * head_dim / tp]
    *_weight_and_bias("layers.{n}.mlp_norm", "language_model.encoder.layers.{n}.post_attention_layernorm"),
    *_weight_and_bias(
        "layers.{n}.mlp.up", "language_model.encoder.layers.{n}.mlp.dense_h_to_4h", 0
    ),  # [ffn / tp, hidden], or [gate; up]
    *_weight_and_bias("layers.{n}.mlp.down", "language_model.encoder.layers.{n}.mlp.dense_4h_to_h", 1),  # [hidden, ffn / tp]
    *_weight_and_bias("final_norm", "language_model.encoder.final_layernorm"),
    MegatronTensor("head.weight", "language_model.output_layer.weight", 0, vocab_rows=True),  # [vocab / tp, hidden]
    *_weight_and_bias("pooler", "language_model.pooler.dense"),
    *_weight_and_bias("masked_words.dense", "lm_head.dense"),
    *_weight_and_bias("masked_words.norm", "lm_head.layernorm"),
    MegatronTensor("masked_words.bias", "lm_head.bias", 0, vocab_rows=True),  # [vocab / tp]
    *_weight_and_bias("order", "binary_head"),
)
TIED_COPY = "word_embeddings_for_head.weight"  # the last stage's, of a tied matrix that the first stage holds
SAVED_CONSTANTS = ("rotary_pos_emb.inv_freq", ".self_attention.bias", ".masked_bias")  # constants that older versions saved
OLDER_NAMES = (("language_model.transformer.", "language_model.encoder."), (".attention.", ".self_attention."))


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer on which the layout of its tensors depends.

    Attributes:
        heads: of queries.
        groups: of heads that share keys and values.
        head_dim: width of a head.
        swiglu: whether the MLP has a gate.
    """

    heads: int
    groups: int
    head_dim: int
    swiglu: bool = False


def flatten_state(state: Mapping[str, Any], prefix: str = "") -> Weights:
    """Return the tensors of a nested dictionary under dotted names, in the spelling of the table."""
    tensors: Weights = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            tensors |= flatten_state(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            name = f"{prefix}{key}"
            for old, new in OLDER_NAMES:
                name = name.replace(old, new)
            tensors[name] = value
    return tensors


def virtual_stages_in_file(file: Mapping[str, Any], name: str) -> list[Weights]:
    """Return the weights of each virtual stage of one rank's file, one where it has none. CheckpointError without weights."""
    keys = (
        ["model"]
        if "model" in file
        else sorted((k for k in file if re.fullmatch(r"model\d+", str(k))), key=lambda k: int(k[5:]))
    )
    if not keys or any(not isinstance(file[key], Mapping) for key in keys):
        raise CheckpointError(f"{name}: it has no `model` with weights in it, so it is no checkpoint of Megatron-LM")
    return [flatten_state(file[key]) for key in keys]


def join_ranks(stages: Sequence[Sequence[Weights]], sizes: LayerSizes, version: float) -> Weights:
    """Join the ranks' weights to those of the whole model, under our global names.

    Args:
        stages: in the model's order, of each stage the weights of its tensor-parallel ranks in order, under dotted names.
        sizes: of a layer.
        version: the files' checkpoint_version.

    Raises:
        CheckpointError: for a tensor that the table does not know, and for ranks that do not belong together.
    """
    whole: Weights = {}
    before = 0  # layers of the stages before
    for ranks in stages:
        if any(rank.keys() != ranks[0].keys() for rank in ranks):
            raise CheckpointError("the tensor-parallel ranks of a stage hold different tensors; they are of different models")
        layers = 0  # of this stage
        for name, first in ranks[0].items():
            if name == TIED_COPY or name.endswith(SAVED_CONSTANTS):
                continue
            found = _find_row(name)
            if found is None and not first.is_floating_point():
                continue  # states of kernels and the like, such as Transformer Engine's _extra_state
            if found is None:
                raise CheckpointError(f"{name}: this tensor has no place in a GPT or BERT of this program")
            row, number = found
            layers = max(layers, number + 1)
            native = row.native.format(n=number + before)
            parts = [rank[name] for rank in ranks]
            for part in parts:
                refuse_unsound({name: part})
            try:
                whole |= _join_parts(native, parts, row, sizes, version)
            except RuntimeError as error:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                raise CheckpointError(f"{name}: its shape {shapes} does not fit the model's settings") from error
        before += layers
    return whole


def _join_parts(native: str, parts: list[Tensor], row: MegatronTensor, sizes: LayerSizes, version: float) -> Weights:
    """Join the ranks' parts of one tensor; it becomes two of ours where it holds a gate as well."""
    if ".mlp.up." in native and sizes.swiglu:
        # Each rank has [gate; up], its halves [ffn / tp, hidden] each, so the whole is not their concatenation.
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return {native.replace(".up.", ".gate."): torch.cat(gates), native: torch.cat(ups)}
    if ".qkv." in native:
        parts = [reorder_qkv(part, sizes, version) for part in parts]
    if row.split_dim is None and any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise CheckpointError(f"{row.megatron}: its copies on the tensor-parallel ranks differ")
    return {native: parts[0] if row.split_dim is None else torch.cat(parts, dim=row.split_dim)}


def _find_row(name: str) -> tuple[MegatronTensor, int] | None:
    """Return the row of a name, and the layer's number in it, -1 without one; None for a name that no row has."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    general = name if match is None else name.replace(match[0], ".layers.{n}.")
    for row in MEGATRON_TENSORS:
        if row.megatron == general:
            return row, -1 if match is None else int(match[1])
    return None


def reorder_qkv(rows: Tensor, sizes: LayerSizes, version: float) -> Tensor:
    """Reorder queries, keys and values of one rank to the order of version 2.0 on, which is ours.

    version 0       [3, heads, head_dim]        version 1.0     [heads, head_dim, 3]        2.0 on      [heads, 3, head_dim]

    Megatron-LM does the same in `fix_query_key_value_ordering`. Groups of heads came later than 2.0.

    Args:
        rows: `[3 * heads * head_dim, ...]`, weight or bias, with the heads of this rank.
        sizes: of a layer.
        version: the file's checkpoint_version.
    """
    if version >= 2.0:
        return rows
    rest, head_dim = rows.shape[1:], sizes.head_dim
    if version >= 1.0:
        return rows.view(-1, head_dim, 3, *rest).transpose(1, 2).reshape(rows.shape)  # [heads, 3, head_dim, ...]
    return rows.view(3, -1, head_dim, *rest).transpose(0, 1).reshape(rows.shape)


def cut_vocabulary(whole: Mapping[str, Tensor], vocab: int) -> Weights:
    """Return the weights with the first `vocab` rows of the vocabulary. CheckpointError when there are fewer, or vocab < 1."""
    if vocab < 1:
        raise CheckpointError(f"a vocabulary of {vocab} tokens; it must have one at least")
    names = {row.native for row in MEGATRON_TENSORS if row.vocab_rows} & whole.keys()
    if short := sorted(name for name in names if whole[name].shape[0] < vocab):
        raise CheckpointError(
            f"{short[0]} has {whole[short[0]].shape[0]} rows, fewer than the {vocab} tokens of the vocabulary"
        )
    return {name: tensor[:vocab].clone() if name in names else tensor for name, tensor in whole.items()}


def resize_vocabulary(whole: Mapping[str, Tensor], vocab: int) -> Weights:
    """Return the weights with `vocab` rows of the vocabulary: the first ones, or all and new ones that are the mean of them.

    CheckpointError for less than one row. A mean row is what the model expects of a word on average, so new tokens neither
    stand out nor have a logit of 0, which many models seldom give a true word.
    """
    names = {row.native for row in MEGATRON_TENSORS if row.vocab_rows} & whole.keys()
    rows = min((whole[name].shape[0] for name in names), default=0)
    if vocab <= rows:
        return cut_vocabulary(whole, vocab)
    if vocab > MAX_TOKENS:
        raise CheckpointError(f"a vocabulary of {vocab:,} tokens, which makes no sense: it may have at most {MAX_TOKENS:,}")

    def grown(old: Tensor) -> Tensor:
        mean = old.double().mean(dim=0, keepdim=True).to(old.dtype)  # [1, hidden]; of the bias of masked words [1]
        return torch.cat([old, mean.expand(vocab - old.shape[0], *old.shape[1:])])

    return {name: grown(tensor) if name in names else tensor for name, tensor in whole.items()}


def split_over_ranks(
    whole: Mapping[str, Tensor], tp: int, stages: Sequence[range], padded: int, *, tied: bool
) -> list[list[dict[str, Any]]]:
    """Split the weights of a model over ranks; the inverse of `join_ranks`.

    Args:
        whole: the weights under our global names.
        tp: tensor-parallel ranks.
        stages: the layers of each pipeline stage.
        padded: rows of the vocabulary with its padding, which tp divides.
        tied: the last of several stages holds a copy of the embedding.

    Returns:
        Of each pipeline stage, of each tensor-parallel rank, the nested dictionary `model` of its file.
    """
    return [
        [_rank_state(whole, layers, tp, rank, padded, first=s == 0, last=s == len(stages) - 1, tied=tied) for rank in range(tp)]
        for s, layers in enumerate(stages)
    ]


def _rank_state(
    whole: Mapping[str, Tensor], layers: range, tp: int, rank: int, padded: int, *, first: bool, last: bool, tied: bool
) -> dict[str, Any]:
    """Return the nested dictionary of one rank. layers: of its stage; first, last: whether it has the embedding, the head."""
    state: dict[str, Any] = {}
    for row in MEGATRON_TENSORS:
        if "{n}" not in row.native and not (first if row.native.startswith("embedding.") else last):
            continue
        for place, number in enumerate(layers) if "{n}" in row.native else [(0, 0)]:  # a stage counts its layers from 0 on
            native = row.native.format(n=number)
            if native in whole:
                _put_nested(state, row.megatron.format(n=place), _rank_part(whole, native, row, tp, rank, padded))
    if tied and last and not first:
        row = MEGATRON_TENSORS[0]
        state["word_embeddings_for_head"] = {"weight": _rank_part(whole, row.native, row, tp, rank, padded)}
    return state


def _rank_part(whole: Mapping[str, Tensor], native: str, row: MegatronTensor, tp: int, rank: int, padded: int) -> Tensor:
    """Return one tensor-parallel rank's part of a tensor, with the gate before what it gates, and the vocabulary padded."""
    tensor, gate = whole[native], whole.get(native.replace(".up.", ".gate.")) if ".mlp.up." in native else None
    if row.vocab_rows:
        # Copies of the last row, as Megatron-LM grows a vocabulary: rows of zeros would be tokens of logit 0, which some models
        # find likelier than any true one, and Megatron-LM's softmax counts them.
        tensor = torch.cat([tensor, tensor[-1:].expand(padded - tensor.shape[0], *tensor.shape[1:])])
    if row.split_dim is None:
        return tensor.clone()
    part = tensor.chunk(tp, dim=row.split_dim)[rank]
    return torch.cat([gate.chunk(tp)[rank], part]) if gate is not None else part.clone()


def _put_nested(state: dict[str, Any], name: str, tensor: Tensor) -> None:
    """Put a tensor into nested dictionaries, as deep as Megatron-LM nests them; the rest of its name stays one dotted key."""
    path, last = _split_name(name)
    for step in path:
        state = state.setdefault(step, {})
    state[last] = tensor


def _split_name(name: str) -> tuple[list[str], str]:
    """Return the keys of the dictionaries in which a tensor lies, and its key in the innermost."""
    # Megatron-LM keeps the state_dict of these modules under one key, with dotted names in it.
    for parent in ("language_model.encoder", "language_model.pooler", "language_model.output_layer", "lm_head", "binary_head"):
        if name.startswith(parent + "."):
            return parent.split("."), name.removeprefix(parent + ".")
    *path, last = name.split(".")
    return path, last
