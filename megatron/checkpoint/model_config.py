"""Read the architecture of a checkpoint's model from its own config.json."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.layout import CONFIG, CheckpointError, read_config, read_manifest
from megatron.config.command_line.saved import from_json
from megatron.config.errors import ConfigError
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelConfig


def read_model_config(directory: Path) -> ModelConfig:
    """Return the architecture that a checkpoint was saved with. CheckpointError when its config.json does not describe one."""
    saved = read_config(directory)
    try:
        model = from_json({"model": saved["model"]}).model
    except KeyError as error:
        raise CheckpointError(f"{directory / CONFIG}: it has no section {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    # The caller builds tables with an entry per layer, so an absurd number must not exhaust memory. A layer has >= 1 tensor.
    if model.num_layers is not None and model.num_layers > 10 * (tensors := len(read_manifest(directory).tensors)):
        raise CheckpointError(f"{directory / CONFIG}: it asks for {model.num_layers:,} layers, and there are {tensors} tensors")
    try:
        return resolve_model(model)
    except ValueError as error:
        raise CheckpointError(f"{directory}: its {CONFIG} describes no model: {error}") from error
