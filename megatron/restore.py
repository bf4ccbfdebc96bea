"""A trained model from its checkpoint, in one process, whatever layout saved it: what export and generation start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.checkpoint.hf import model_config
from megatron.checkpoint.layout import TOKENIZER, CheckpointError, find, read_manifest
from megatron.checkpoint.load import load
from megatron.checkpoint.storage import TORCH_DTYPES
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.schema import ModelConfig
from megatron.contract import StagePart
from megatron.data.tokenizer import Tokenizer, load_tokenizer
from megatron.mesh.mesh import Axis
from megatron.model.gpt import GPT


@dataclass(frozen=True)
class Opened:
    """model: whole, in evaluation mode. tokenizer: the one it was trained with; None when the checkpoint holds none.

    directory: the iter_ directory that all of it came from.
    """

    model: GPT
    config: ModelConfig
    tokenizer: Tokenizer | None
    iteration: int
    directory: Path


def open_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer saved in a checkpoint directory, None when there is none. DataError when it is damaged."""
    folder = directory / TOKENIZER
    return load_tokenizer(folder) if folder.is_dir() else None


def open_model(
    checkpoint: Path | str,
    *,
    iteration: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Opened:
    """Read a model from a directory of checkpoints, or from one iter_ directory.

    iteration: default the latest. dtype: default that of the saved embedding. CheckpointError or DataError says what is
    not there or damaged.
    """
    directory = find(Path(checkpoint), iteration)
    manifest, config = read_manifest(directory), model_config(directory)
    word = manifest.tensors.get("model.embedding.word.weight")
    if word is None:
        raise CheckpointError(f"{directory}: it holds no GPT, there is no model.embedding.word.weight")
    try:
        model = GPT(
            config,
            StagePart(range(config.size("num_layers")), True, True),
            Axis.alone("tp"),
            dtype=dtype or TORCH_DTYPES[word.dtype],
            device=device,
        )
    except ValueError as error:
        raise CheckpointError(f"{directory}: its config.json describes no model: {error}") from error
    load(directory, {"model": ModuleWeights(model)})
    return Opened(model.eval(), config, open_tokenizer(directory), manifest.iteration, directory)
