"""Small models whose every weight matters: each bias, norm and matrix differs from its initial value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from megatron.checkpoint.save import save
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.command_line.saved import to_json
from megatron.config.schema import ModelConfig, RunSettings
from megatron.contract import StagePart
from megatron.interop.families import table
from megatron.interop.families.family import HFFamily
from megatron.interop.tensor_mapping import TensorMapping
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Axis, Mesh
from megatron.model.build import MODELS
from megatron.model.gpt import GPT
from megatron.model.init import initialize
from megatron.parallel.random import derive_seed
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel

BASE: dict[str, Any] = dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=72,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    max_position_embeddings=48,
    vocab_size=127,
)
LLAMA: dict[str, Any] = dict(
    BASE,
    normalization="RMSNorm",
    position_embedding_type="rope",
    activation="swiglu",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
BERT: dict[str, Any] = dict(BASE, architecture="bert")


def build(config: ModelConfig, tp: Axis, dtype: torch.dtype = torch.float32) -> GPT:
    """Build this rank's part of a model, with random weights.

    Args:
        config: of the model.
        tp: the tensor-parallel axis.
        dtype: of the weights.
    """
    part = StagePart(range(config.num_layers), True, True)
    model = MODELS[config.architecture](config, part, TensorParallel(tp), dtype=dtype)
    initialize(model, config, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            spec = param_spec(parameter)
            noise = torch.randn(spec.shape, generator=torch.Generator().manual_seed(derive_seed(3, spec.name)))
            spec.local(parameter).add_(noise[spec.part.slices] * 0.2)
    return model


def with_rows(family: HFFamily, rows: tuple[TensorMapping, ...]) -> HFFamily:
    """Return the family with another table for its first class."""
    return replace(family, classes=(replace(family.classes[0], templates=rows), *family.classes[1:]))


def list_family(monkeypatch: pytest.MonkeyPatch, family: HFFamily) -> None:
    """Put a family in the table, where an installed package's entry point puts it."""
    monkeypatch.setattr(table, "FAMILIES", MappingProxyType({**table.FAMILIES, family.model_type: family}))


def max_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest absolute difference of the same logits of two models."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def save_model(root: str, settings: dict[str, Any], tp: int, dtype: torch.dtype, tokenizer: Any) -> None:
    """Build and save a model; called on every rank of tp.

    Args:
        root: the directory of checkpoints.
        settings: of the model.
        tp: ranks over which it is split.
        dtype: of the weights.
        tokenizer: whose files are saved too, or None.
    """
    import torch.distributed as dist

    config = ModelConfig(**settings)
    mesh = Mesh.build(Grid(tp=tp), dist.get_rank() if tp > 1 else 0)
    parts = {"model": ModuleWeights(build(config, mesh.tp, dtype))}
    save(Path(root), 10, parts, mesh, config=to_json(RunSettings(model=config)), assets=tokenizer and tokenizer.files())
