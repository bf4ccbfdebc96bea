"""Fills in every setting that follows from others. The values are Megatron-LM's, so its scripts mean the same here."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

from megatron.config.batch_size import iterations_for, parse_steps
from megatron.config.schema import BatchConfig, LayoutConfig, ModelConfig, OptimConfig, RunConfig, TaskConfig
from megatron.config.stage_split import wants_virtual_stages
from megatron.pipeline.schedules.schedule import DEFAULT, DEFAULT_WITH_CHUNKS


def data_parallel_size(layout: LayoutConfig, world_size: int) -> int | None:
    """What the other axes leave of the world; None where they do not divide it."""
    model = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    return world_size // model if model > 0 and world_size >= model and world_size % model == 0 else None


def resolve(config: RunConfig, world_size: int = 1) -> RunConfig:
    """`config` with every derived setting filled in. Resolving twice changes nothing.

    A setting stays open where what it follows from is missing or does not fit; `rules.check` says why.
    """
    batch = _batch(config.batch, data_parallel_size(config.layout, world_size), config.data.seq_length)
    layout, log = config.layout, config.log
    return replace(
        config,
        model=_model(config.model, config.data.seq_length),
        layout=replace(
            layout,
            sequence_parallel=layout.sequence_parallel and layout.tensor_model_parallel_size > 1,
            pipeline_schedule=layout.pipeline_schedule or (DEFAULT_WITH_CHUNKS if wants_virtual_stages(layout) else DEFAULT),
        ),
        batch=batch,
        optim=_optim(config.optim, batch),
        log=replace(
            log,
            wandb_project=log.wandb_project or None,  # an empty one turns W&B off, as in Megatron-LM
            wandb_save_dir=log.wandb_save_dir or (_within(config.checkpoint.save, "wandb") if log.wandb_project else None),
            metrics_path=log.metrics_path or _within(config.checkpoint.save, "metrics.jsonl"),
            profile_pipeline=_profile(log.profile_pipeline, config.checkpoint.save),
        ),
        task=_task(config.task, config.checkpoint.save),
    )


def _model(model: ModelConfig, seq_length: int | None) -> ModelConfig:
    hidden, heads = model.hidden_size, model.num_attention_heads
    ffn, kv, positions = model.ffn_hidden_size, model.kv_channels, model.max_position_embeddings
    if ffn is None and hidden is not None:
        # SwiGLU has three matrices where the others have two: two thirds of the width keep the number of parameters.
        ffn = max(64, int((4 * hidden * 2 / 3) / 64) * 64) if model.activation == "swiglu" else 4 * hidden
    if kv is None and hidden is not None and heads and hidden % heads == 0:
        kv = hidden // heads
    if positions is None and model.position_embedding_type != "learned_absolute":
        positions = seq_length
    groups = heads if model.num_query_groups is None else model.num_query_groups
    return replace(model, ffn_hidden_size=ffn, kv_channels=kv, num_query_groups=groups, max_position_embeddings=positions)


def _batch(batch: BatchConfig, dp: int | None, seq_length: int | None) -> BatchConfig:
    batch = replace(batch, batch_size_steps=_steps(batch, seq_length))
    if batch.batch_size_steps:
        batch = replace(batch, global_batch_size=batch.batch_size_steps[-1])
    if batch.global_batch_size is None and batch.micro_batch_size is not None and dp is not None:
        batch = replace(batch, global_batch_size=batch.micro_batch_size * dp)
    multiple = (batch.micro_batch_size or 1) * (dp or 1) if batch.decrease_batch_size_if_needed else 1
    batch = replace(batch, batch_multiple=max(1, multiple))
    size, ramp = batch.global_batch_size, batch.rampup_batch_size
    sound = size is not None and size > 0 and (not ramp or (len(ramp) == 3 and min(ramp) > 0 and ramp[0] <= size))
    if batch.train_iters is None and batch.train_samples is not None and sound:
        batch = replace(batch, train_iters=iterations_for(batch, batch.train_samples))
    return batch


def _steps(batch: BatchConfig, seq_length: int | None) -> tuple[int, ...]:
    if not batch.step_batch_size_schedule or batch.rampup_batch_size or not seq_length or seq_length < 1:
        return ()
    try:
        return tuple(chain(*parse_steps(batch.step_batch_size_schedule, seq_length)))
    except ValueError:  # which a rule reports
        return ()


def _optim(optim: OptimConfig, batch: BatchConfig) -> OptimConfig:
    decay_iters, decay_samples = optim.lr_decay_iters, optim.lr_decay_samples
    if batch.train_samples is not None:
        decay_samples = batch.train_samples if decay_samples is None else decay_samples
    elif decay_iters is None:
        decay_iters = batch.train_iters
    start, end = optim.start_weight_decay, optim.end_weight_decay
    if optim.weight_decay_incr_style == "constant":
        start = optim.weight_decay if start is None else start
        end = optim.weight_decay if end is None else end
    return replace(
        optim, lr_decay_iters=decay_iters, lr_decay_samples=decay_samples, start_weight_decay=start, end_weight_decay=end
    )


def _profile(wanted: str | None, save: str | None) -> str | None:
    """The directory of --profile-pipeline; the flag alone is the empty word."""
    return (save or "pipeline_profile") if wanted == "" else wanted


def _within(save: str | None, name: str) -> str | None:
    return None if save is None else str(Path(save) / name)


def _task(task: TaskConfig, save: str | None) -> TaskConfig:
    if task.task is None or task.results_path is not None:
        return task
    return replace(task, results_path=_within(save, "results.json"))
