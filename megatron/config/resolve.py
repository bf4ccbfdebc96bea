"""Fill in every setting that follows from others."""

from __future__ import annotations

from dataclasses import replace

from megatron.config.batch import derive_batch
from megatron.config.layout import data_parallel_size
from megatron.config.log import derive_log
from megatron.config.model import derive_model
from megatron.config.optim import derive_optim
from megatron.config.pipeline import derive_layout
from megatron.config.schema import RunConfig
from megatron.config.task import derive_task


def resolve(config: RunConfig, world_size: int = 1) -> RunConfig:
    """Return `config` with every derived setting filled in. Resolving twice changes nothing.

    A setting stays open where what it follows from is missing or does not fit; `rules.check` says why.
    """
    batch = derive_batch(config.batch, data_parallel_size(config.layout, world_size), config.data.seq_length)
    return replace(
        config,
        model=derive_model(config.model, config.data.seq_length),
        layout=derive_layout(config.layout),
        batch=batch,
        optim=derive_optim(config.optim, batch),
        log=derive_log(config.log, config.checkpoint.save),
        task=derive_task(config.task, config.checkpoint.save),
    )
