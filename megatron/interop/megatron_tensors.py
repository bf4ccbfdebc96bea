"""Map the tensors of Megatron-LM's checkpoints to ours and back: their names, and how ranks split them.

    iter_0000100/mp_rank_01_002/model_optim_rng.pt     tensor-parallel rank 1 of pipeline stage 2; mp_rank_01 without stages

A file holds a nested dictionary. Its weights are in `model`, or in `model0`, `model1`, ... with virtual stages, each of which
numbers its layers from 0. Each row of the table below maps one of our tensors to one of theirs, and gives the dimension along
which ranks split it. Two tensors have another layout as well: Megatron-LM has ordered queries, keys and values in three ways,
and it stores the gate and the up projection of a SwiGLU in one matrix.
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
        native: our name.
        megatron: Megatron-LM's name: the keys of the nested dictionaries, joined by dots.
        split_dim: the dimension that tensor-parallel ranks split; None if each has a copy.
        vocab_rows: whether the rows are tokens; the vocabulary is then padded so that every rank has the same number.
    """

    native: str
    megatron: str
    split_dim: int | None = None
    vocab_rows: bool = False


def _weight_and_bias(native: str, megatron: str, split_dim: int | None = None) -> tuple[MegatronTensor, MegatronTensor]:
    """Return the rows of a weight and its bias; the bias is split only if ranks split the output features, dimension 0."""
    weight = MegatronTensor(f"{native}.weight", f"{megatron}.weight", split_dim)
    return weight, MegatronTensor(f"{native}.bias", f"{megatron}.bias", 0 if split_dim == 0 else None)


# The names of Megatron-LM 23.06; OLDER_NAMES replaces earlier ones. Weights are [out, in], as ours.
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
TIED_COPY = "word_embeddings_for_head.weight"  # the last stage's copy of the tied word embedding
# Endings of the names of constants, which older versions saved among the weights.
SAVED_CONSTANTS = ("rotary_pos_emb.inv_freq", ".self_attention.bias", ".masked_bias")
OLDER_NAMES = (("language_model.transformer.", "language_model.encoder."), (".attention.", ".self_attention."))


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer on which the layout of its tensors depends.

    Attributes:
        heads: the number of query heads.
        groups: the number of key-value heads, each shared by a group of query heads.
        head_dim: the width of a head.
        swiglu: whether the MLP has a gate.
    """

    heads: int
    groups: int
    head_dim: int
    swiglu: bool = False


def flatten_state(state: Mapping[str, Any], prefix: str = "") -> Weights:
    """Return the tensors of a nested dictionary under dotted names, as in the column `megatron` of the table."""
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
    """Return the weights of each virtual stage in one rank's file. CheckpointError if it contains no weights."""
    keys = (
        ["model"]
        if "model" in file
        else sorted((k for k in file if re.fullmatch(r"model\d+", str(k))), key=lambda k: int(k[5:]))
    )
    if not keys or any(not isinstance(file[key], Mapping) for key in keys):
        raise CheckpointError(f"{name}: it has no `model` with weights in it, so it is not a checkpoint of Megatron-LM")
    return [flatten_state(file[key]) for key in keys]


def join_ranks(stages: Sequence[Sequence[Weights]], sizes: LayerSizes, version: float) -> Weights:
    """Join the ranks' weights to those of the whole model, under our global names.

    Args:
        stages: `stages[s][t]` are the weights of stage s, in the model's order, on tensor-parallel rank t, under dotted names.
        sizes: the sizes of a layer.
        version: the files' checkpoint_version.

    Raises:
        CheckpointError: the table has no row for a tensor, a tensor does not have the expected shape or values, or the ranks
            do not belong to one model.
    """
    whole: Weights = {}
    first_layer = 0  # global number of the stage's first layer
    for ranks in stages:
        if any(rank.keys() != ranks[0].keys() for rank in ranks):
            raise CheckpointError("the tensor-parallel ranks of a stage hold different tensors; they are of different models")
        num_layers = 0  # of this stage
        for name, first in ranks[0].items():
            if name == TIED_COPY or name.endswith(SAVED_CONSTANTS):
                continue
            row_and_layer = _find_row(name)
            if row_and_layer is None and not first.is_floating_point():
                continue  # not a weight, such as Transformer Engine's _extra_state
            if row_and_layer is None:
                raise CheckpointError(f"{name}: the GPT and BERT here have no such tensor")
            row, layer = row_and_layer
            num_layers = max(num_layers, layer + 1)
            native = row.native.format(n=layer + first_layer)
            parts = [rank[name] for rank in ranks]
            for part in parts:
                refuse_unsound({name: part})
            try:
                whole |= _join_parts(native, parts, row, sizes, version)
            except RuntimeError as error:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                raise CheckpointError(f"{name}: its shape {shapes} does not fit the model's settings") from error
        first_layer += num_layers
    return whole


def _join_parts(native: str, parts: list[Tensor], row: MegatronTensor, sizes: LayerSizes, version: float) -> Weights:
    """Join the ranks' parts of one tensor; a SwiGLU's joined gate and up projection become two of our tensors."""
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
    """Return the row for a name of Megatron-LM and the layer's number in the name, -1 without one; None if no row has it."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    template = name if match is None else name.replace(match[0], ".layers.{n}.")
    for row in MEGATRON_TENSORS:
        if row.megatron == template:
            return row, -1 if match is None else int(match[1])
    return None


def reorder_qkv(rows: Tensor, sizes: LayerSizes, version: float) -> Tensor:
    """Reorder one rank's queries, keys and values to our order, which is that of version 2.0 and later.

        version 0               [3, heads, head_dim]
        version 1.0             [heads, head_dim, 3]
        version 2.0 and later   [heads, 3, head_dim]

    Megatron-LM does the same in `fix_query_key_value_ordering`. Versions before 2.0 have no groups of heads.

    Args:
        rows: `[3 * heads * head_dim, ...]`, a weight or bias with the heads of this rank.
        sizes: the sizes of a layer.
        version: the file's checkpoint_version.
    """
    if version >= 2.0:
        return rows
    features, head_dim = rows.shape[1:], sizes.head_dim  # [hidden] of a weight, [] of a bias
    if version >= 1.0:
        return rows.view(-1, head_dim, 3, *features).transpose(1, 2).reshape(rows.shape)  # [heads, 3, head_dim, ...]
    return rows.view(3, -1, head_dim, *features).transpose(0, 1).reshape(rows.shape)


def cut_vocabulary(whole: Mapping[str, Tensor], vocab: int) -> Weights:
    """Return the weights with the first `vocab` rows of the vocabulary. CheckpointError if there are fewer, or vocab < 1."""
    if vocab < 1:
        raise CheckpointError(f"a vocabulary of {vocab} tokens; it must have at least one")
    names = {row.native for row in MEGATRON_TENSORS if row.vocab_rows} & whole.keys()
    if short := sorted(name for name in names if whole[name].shape[0] < vocab):
        raise CheckpointError(
            f"{short[0]} has {whole[short[0]].shape[0]} rows, fewer than the {vocab} tokens of the vocabulary"
        )
    return {name: tensor[:vocab].clone() if name in names else tensor for name, tensor in whole.items()}


def resize_vocabulary(whole: Mapping[str, Tensor], vocab: int) -> Weights:
    """Return the weights with `vocab` rows of the vocabulary: the first rows, or all of them and new ones.

    New rows are the mean of the old ones, so that new tokens begin with average logits. Rows of zeros would have the logit 0,
    which in many models is higher than that of most true tokens. CheckpointError if `vocab` is less than 1 or too large.
    """
    names = {row.native for row in MEGATRON_TENSORS if row.vocab_rows} & whole.keys()
    rows = min((whole[name].shape[0] for name in names), default=0)
    if vocab <= rows:
        return cut_vocabulary(whole, vocab)
    if vocab > MAX_TOKENS:
        raise CheckpointError(f"a vocabulary of {vocab:,} tokens, which makes no sense: it may have at most {MAX_TOKENS:,}")

    def with_new_rows(old: Tensor) -> Tensor:
        mean = old.double().mean(dim=0, keepdim=True).to(old.dtype)  # [1, hidden]; [1] for the bias of the masked-word head
        return torch.cat([old, mean.expand(vocab - old.shape[0], *old.shape[1:])])

    return {name: with_new_rows(tensor) if name in names else tensor for name, tensor in whole.items()}


def split_over_ranks(
    whole: Mapping[str, Tensor], tp: int, stages: Sequence[range], padded: int, *, tied: bool
) -> list[list[dict[str, Any]]]:
    """Split the weights of a model over ranks; the inverse of `join_ranks`.

    Args:
        whole: the whole tensors under our global names.
        tp: the tensor-parallel size.
        stages: the layers of each pipeline stage.
        padded: the number of rows of the padded vocabulary, a multiple of tp.
        tied: whether embedding and output layer are tied; the last of several stages then gets a copy.

    Returns:
        For each pipeline stage and tensor-parallel rank, in this order, the nested dictionary `model` of its file.
    """
    return [
        [_rank_state(whole, layers, tp, rank, padded, first=s == 0, last=s == len(stages) - 1, tied=tied) for rank in range(tp)]
        for s, layers in enumerate(stages)
    ]


def _rank_state(
    whole: Mapping[str, Tensor], layers: range, tp: int, rank: int, padded: int, *, first: bool, last: bool, tied: bool
) -> dict[str, Any]:
    """Return the nested dictionary of one rank. first, last: whether its stage has the embedding, the head."""
    state: dict[str, Any] = {}
    for row in MEGATRON_TENSORS:
        if "{n}" not in row.native and not (first if row.native.startswith("embedding.") else last):
            continue
        for local_layer, layer in enumerate(layers) if "{n}" in row.native else [(0, 0)]:  # a stage numbers its layers from 0
            native = row.native.format(n=layer)
            if native in whole:
                _put_nested(state, row.megatron.format(n=local_layer), _rank_part(whole, native, row, tp, rank, padded))
    if tied and last and not first:
        row = MEGATRON_TENSORS[0]
        state["word_embeddings_for_head"] = {"weight": _rank_part(whole, row.native, row, tp, rank, padded)}
    return state


def _rank_part(whole: Mapping[str, Tensor], native: str, row: MegatronTensor, tp: int, rank: int, padded: int) -> Tensor:
    """Return one tensor-parallel rank's part of a tensor: padded if it has a vocabulary, the gate and up projection joined."""
    tensor, gate = whole[native], whole.get(native.replace(".up.", ".gate.")) if ".mlp.up." in native else None
    if row.vocab_rows:
        # The padding is copies of the last row, as in Megatron-LM's own conversion. Its softmax includes padding, and rows of
        # zeros would have the logit 0, in some models the highest.
        tensor = torch.cat([tensor, tensor[-1:].expand(padded - tensor.shape[0], *tensor.shape[1:])])
    if row.split_dim is None:
        return tensor.clone()
    part = tensor.chunk(tp, dim=row.split_dim)[rank]
    return torch.cat([gate.chunk(tp)[rank], part]) if gate is not None else part.clone()


def _put_nested(state: dict[str, Any], name: str, tensor: Tensor) -> None:
    """Put a tensor into nested dictionaries as Megatron-LM nests them."""
    parents, key = _split_name(name)
    for parent in parents:
        state = state.setdefault(parent, {})
    state[key] = tensor


def _split_name(name: str) -> tuple[list[str], str]:
    """Return the keys of the nested dictionaries that contain a tensor, and its key in the innermost."""
    # Megatron-LM stores the state_dict of each of these modules in one dictionary, whose keys are dotted names.
    for parent in ("language_model.encoder", "language_model.pooler", "language_model.output_layer", "lm_head", "binary_head"):
        if name.startswith(parent + "."):
            return parent.split("."), name.removeprefix(parent + ".")
    *parents, key = name.split(".")
    return parents, key
