"""Resolve a user's settings into a run's configuration, by deriving the settings that follow from others."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar, get_type_hints

from megatron.config.batch import derive_batch
from megatron.config.layout import data_parallel_size
from megatron.config.log import derive_log
from megatron.config.model import ModelConfig, ModelSettings, derive_model
from megatron.config.optim import derive_optim
from megatron.config.pipeline import derive_layout
from megatron.config.schema import RunConfig, RunSettings
from megatron.config.task import derive_task

Section = TypeVar("Section")


def derive(settings: RunSettings, world_size: int = 1) -> RunSettings:
    """Return `settings` with every derived setting filled in. Idempotent.

    A setting stays None if the settings that it is derived from are missing or wrong; `rules.check` reports those.
    """
    # The batch comes first, because the learning-rate schedule derives its length from the run's iterations.
    batch = derive_batch(settings.batch, data_parallel_size(settings.layout, world_size), settings.data.seq_length)
    return replace(
        settings,
        model=derive_model(settings.model, settings.data.seq_length),
        layout=derive_layout(settings.layout),
        batch=batch,
        optim=derive_optim(settings.optim, batch),
        log=derive_log(settings.log, settings.checkpoint.save),
        task=derive_task(settings.task, settings.checkpoint.save),
    )


def resolve(settings: RunSettings, world_size: int = 1) -> RunConfig:
    """Return the configuration of a run. ValueError names the first missing setting; `rules.check` reports all of them."""
    settings = derive(settings, world_size)
    return RunConfig(**{name: complete(getattr(settings, name), kind) for name, kind in get_type_hints(RunConfig).items()})


def resolve_model(settings: ModelSettings) -> ModelConfig:
    """Return the configuration of a model without a run. ValueError names a setting that is missing or does not fit."""
    model = derive_model(settings, None)
    # `complete` would only report that kv_channels is missing. For a run, the rule `head_width` reports the cause.
    if model.kv_channels is None and model.num_attention_heads and model.hidden_size:
        raise ValueError(f"{model.num_attention_heads} attention heads do not divide the width {model.hidden_size}")
    return complete(model, ModelConfig)


def complete(settings: Any, kind: type[Section]) -> Section:
    """Convert a section from its settings type to its config type, whose required fields are never None.

    Args:
        settings: the section, after its `derive_...` function.
        kind: the section's dataclass in `RunConfig`.

    Raises:
        ValueError: a required field is still None.
    """
    if isinstance(settings, kind):  # a section without derived settings has only one type; or it was resolved before
        return settings
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and getattr(settings, field.name) is None:
            raise ValueError(f"{kind.__name__}.{field.name} is not resolved: it does not follow from other settings")
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})  # type: ignore[arg-type]
