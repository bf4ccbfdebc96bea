"""Resolve a user's settings into a run's configuration: fill in every setting that follows from others."""

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

    A setting stays None when those that it follows from are missing or do not fit; `rules.check` reports why.
    """
    # The batch first: lengths of the learning-rate schedule follow from the run's iterations.
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
    """Return the configuration of a run. ValueError names a setting that is missing; `rules.check` reports all of them."""
    settings = derive(settings, world_size)
    return RunConfig(**{name: complete(getattr(settings, name), kind) for name, kind in get_type_hints(RunConfig).items()})


def resolve_model(settings: ModelSettings) -> ModelConfig:
    """Return the configuration of a model alone, without a run. ValueError says which setting is missing or does not fit."""
    model = derive_model(settings, None)
    # A clearer message than that kv_channels is missing; a run has the rule `head_width` for it.
    if model.kv_channels is None and model.num_attention_heads and model.hidden_size:
        raise ValueError(f"{model.num_attention_heads} attention heads do not divide the width {model.hidden_size}")
    return complete(model, ModelConfig)


def complete(settings: Any, kind: type[Section]) -> Section:
    """Return a section's derived settings as the type that a run uses, in which they are never None.

    Args:
        settings: the section, after its `derive_...`.
        kind: the section's dataclass in `RunConfig`.

    Raises:
        ValueError: a setting that a run needs is still None.
    """
    if isinstance(settings, kind):  # sections with nothing to derive have one type, and a resolved run may come in again
        return settings
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and getattr(settings, field.name) is None:
            raise ValueError(f"{kind.__name__}.{field.name} is not resolved: it does not follow from other settings")
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})  # type: ignore[arg-type]
