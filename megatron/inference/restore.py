"""Open a trained model from a checkpoint of any layout, in one process or divided over several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

import torch

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import CONFIG, CheckpointError, Manifest, read_manifest
from megatron.checkpoint.load import load
from megatron.checkpoint.model_config import read_model_config
from megatron.checkpoint.storage import DTYPE_FROM_CODE
from megatron.checkpoint.tokenizer import open_tokenizer
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.schema import ModelConfig
from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.inference.pipeline import Pipeline
from megatron.mesh.mesh import Mesh
from megatron.model.build import build_stages
from megatron.model.transformer import Transformer
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.pipeline.transfer import Channels
from megatron.plan.size import MetaModel
from megatron.plan.stages import plan_model_stages

Model = TypeVar("Model")


@dataclass(frozen=True)
class OpenedModel(Generic[Model]):
    """A model read from a checkpoint.

    Attributes:
        model: the model, in evaluation mode.
        config: the model's configuration.
        tokenizer: the tokenizer that it was trained with; None if the checkpoint holds none.
        iteration: iteration of the checkpoint.
        directory: the iter_ directory that it was read from.
    """

    model: Model
    config: ModelConfig
    tokenizer: Tokenizer | None
    iteration: int
    directory: Path


def open_model(
    checkpoint: Path | str,
    *,
    iteration: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> OpenedModel[Transformer]:
    """Read a whole model into this process, from a directory of checkpoints or from one iter_ directory.

    Args:
        checkpoint: the directory.
        iteration: the iteration to open; default the latest.
        device: device of the parameters.
        dtype: dtype of the parameters; default that of the saved embedding.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        DataError: its tokenizer is damaged.
    """
    mesh = Mesh.single()
    directory, manifest, config = _find(checkpoint, iteration)
    stages = _stages(directory, manifest, config, mesh, device, dtype)[1]
    load(directory, {"model": ModuleWeights(*stages.values())}, mesh)
    return OpenedModel(stages[0].eval(), config, open_tokenizer(directory), manifest.iteration, directory)


def open_pipeline(
    checkpoint: Path | str,
    mesh: Mesh,
    *,
    iteration: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> OpenedModel[Pipeline]:
    """Read a model divided over the tensor- and pipeline-parallel ranks of `mesh`; see `open_model`. Collective.

    Args:
        checkpoint: a directory of checkpoints, or one iter_ directory.
        mesh: the parallel axes.
        iteration: the iteration to open; default the latest.
        device: device of this rank's parameters.
        dtype: dtype of the parameters; default that of the saved embedding.
    """
    directory, manifest, config = _find(checkpoint, iteration)
    placement, stages = _stages(directory, manifest, config, mesh, device, dtype)
    load(directory, {"model": ModuleWeights(*stages.values())}, mesh)
    model = Pipeline(config, stages, placement, Channels(mesh.pp, mesh.pp_back, torch.device(device)))
    model.eval()
    return OpenedModel(model, config, open_tokenizer(directory), manifest.iteration, directory)


def text_tokenizer(opened: OpenedModel[Transformer] | OpenedModel[Pipeline]) -> Tokenizer:
    """Return the tokenizer of a model that generates text; DataError for a BERT, or without a tokenizer."""
    if opened.config.architecture != "gpt":
        raise DataError(f"{opened.directory} holds a BERT, which fills in masked words and does not go on with a text")
    if opened.tokenizer is None:
        raise DataError(f"{opened.directory} holds no tokenizer: it was not saved by a pretraining run")
    return opened.tokenizer


def _find(checkpoint: Path | str, iteration: int | None) -> tuple[Path, Manifest, ModelConfig]:
    directory = find_checkpoint(Path(checkpoint), iteration)
    return directory, read_manifest(directory), read_model_config(directory)


def _stages(
    directory: Path, manifest: Manifest, config: ModelConfig, mesh: Mesh, device: torch.device | str, dtype: torch.dtype | None
) -> tuple[tuple[int, ...], dict[int, Transformer]]:
    """Build this rank's stages, with uninitialised parameters; return the pipeline rank of every stage, and the stages."""
    word = manifest.tensors.get("model.embedding.word.weight")
    if word is None:
        raise CheckpointError(f"{directory}: it holds no model, there is no model.embedding.word.weight")
    _check_size(directory, manifest, config)
    try:
        plan = plan_model_stages(config, mesh.pp.size)
        stages = build_stages(
            config,
            plan.placement,
            plan.parts,
            TensorParallel(mesh.tp),
            mesh.pp.rank,
            dtype=dtype or DTYPE_FROM_CODE[word.dtype],
            device=device,
        )
    except ValueError as error:
        cut = f" that can be cut for tensor parallel {mesh.tp.size} x pipeline parallel {mesh.pp.size}"
        what = "no model" + (cut if mesh.world.size > 1 else "")
        raise CheckpointError(f"{directory}: its config.json describes {what}: {error}") from error
    return plan.placement, stages


def _check_size(directory: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Raise CheckpointError if the configuration describes a far larger model, before memory is allocated for it.

    Smaller differences are reported when the weights are loaded, tensor by tensor.
    """
    held = sum(prod(t.shape) for n, t in manifest.tensors.items() if n.startswith("model."))
    try:
        asked = MetaModel(config).count()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: its {CONFIG} describes no model: {error}") from error
    if asked > 2 * held:
        raise CheckpointError(
            f"{directory}: its {CONFIG} describes a model of {asked:,} parameters, of which {held:,} are here"
        )
