"""Small GPTs with random weights that generate text, and their checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron.checkpoint.save import save
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.command_line.saved import to_json
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelConfig, RunSettings
from megatron.contract import StagePart
from megatron.inference.pipeline import Pipeline
from megatron.mesh.mesh import Mesh
from megatron.model.gpt import GPT
from megatron.parallel.tensor_parallel import TensorParallel

POSITIONS = 48


def build_random_gpt(form: ModelConfig, vocab: int = 127) -> GPT:
    """Build a GPT with random weights; norms of either sign, so that a tied output layer does not repeat its input for ever."""
    wanted = replace(form, max_position_embeddings=POSITIONS, vocab_size=vocab)
    config = replace(resolve_model(wanted), vocab_size=vocab)
    model = GPT(config, StagePart(range(config.num_layers), True, True), TensorParallel.alone())
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if name.endswith("bias") else 0.3 if parameter.dim() > 1 else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def as_pipeline(model: GPT | Pipeline) -> Pipeline:
    """Return the model as a pipeline, of which it is the only stage."""
    return model if isinstance(model, Pipeline) else Pipeline.alone(model)


def save_model(model: GPT, root: Path, assets=None) -> Path:
    """Save a model, and return the directory of its checkpoint.

    Args:
        model: the whole model.
        root: the directory of checkpoints.
        assets: files of the tokenizer.
    """
    config = to_json(RunSettings(model=model.config))
    return save(root, 1, {"model": ModuleWeights(model)}, Mesh.single(), config=config, assets=assets)
