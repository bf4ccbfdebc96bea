"""The legal range of every number of the schema, one row a kind of range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron.config.errors import Problem
from megatron.config.options import by_name, flag_text
from megatron.config.schema import RunConfig


@dataclass(frozen=True)
class Range:
    """`text` says in words what `holds` tests."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Range("greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or greater", lambda v: v >= 0)
PROBABILITY = Range("at least 0 and less than 1", lambda v: 0 <= v < 1)
WITHIN = Range("greater than 0 and less than 1", lambda v: 0 < v < 1)
CHANCE = Range("from 0 to 1", lambda v: 0 <= v <= 1)
SHARE = Range("greater than 0 and at most 1", lambda v: 0 < v <= 1)
MAX_TOKENS = 1 << 24  # ids of a stranger's tokenizer, and new rows of a vocabulary; the largest known ones have a million
# What is listed one by one, layer by layer and micro-batch by micro-batch.
LAYERS = Range("greater than 0 and at most 65,536", lambda v: 0 < v <= 1 << 16)
SAMPLES = Range("greater than 0 and at most 1,048,576", lambda v: 0 < v <= 1 << 20)

_ROWS: tuple[tuple[Range, str, str], ...] = (
    (LAYERS, "model", "num_layers"),
    (POSITIVE, "model", "hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels"),
    (POSITIVE, "model", "max_position_embeddings rotary_base layernorm_epsilon make_vocab_size_divisible_by"),
    (SHARE, "model", "rotary_percent"),
    (PROBABILITY, "model", "attention_dropout hidden_dropout"),
    (NOT_NEGATIVE, "model", "init_method_std"),
    (POSITIVE, "layout", "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size"),
    (POSITIVE, "layout", "num_layers_per_virtual_pipeline_stage distributed_timeout_minutes ddp_bucket_size"),
    (POSITIVE, "layout", "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers"),
    (LAYERS, "layout", "num_virtual_stages_per_pipeline_rank"),
    (NOT_NEGATIVE, "layout", "hang_timeout_seconds"),
    (POSITIVE, "tokenizer", "vocab_size"),
    (NOT_NEGATIVE, "tokenizer", "vocab_extra_ids"),
    (POSITIVE, "data", "seq_length"),
    (NOT_NEGATIVE, "data", "num_workers"),
    (WITHIN, "data", "mask_prob"),
    (CHANCE, "data", "short_seq_prob"),
    (SAMPLES, "batch", "global_batch_size"),
    (POSITIVE, "batch", "micro_batch_size train_iters train_samples exit_interval exit_duration_in_mins"),
    (NOT_NEGATIVE, "batch", "seed"),
    (NOT_NEGATIVE, "optim", "lr min_lr lr_warmup_iters lr_warmup_samples lr_warmup_init decoupled_lr"),
    (NOT_NEGATIVE, "optim", "decoupled_min_lr weight_decay start_weight_decay end_weight_decay"),
    (POSITIVE, "optim", "lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples"),
    (POSITIVE, "optim", "adam_eps max_consecutive_skips"),
    (PROBABILITY, "optim", "lr_warmup_fraction adam_beta1 adam_beta2 sgd_momentum"),
    (NOT_NEGATIVE, "optim", "clip_grad"),
    (NOT_NEGATIVE, "precision", "loss_scale"),
    (POSITIVE, "precision", "initial_loss_scale min_loss_scale loss_scale_window hysteresis"),
    (POSITIVE, "memory", "recompute_num_layers"),
    (POSITIVE, "checkpoint", "save_interval save_interval_mins keep_last keep_every"),
    (NOT_NEGATIVE, "checkpoint", "load_iteration"),
    (NOT_NEGATIVE, "eval", "eval_iters eval_interval"),
    (NOT_NEGATIVE, "task", "epochs"),
    (POSITIVE, "task", "overlapping_eval"),
    (POSITIVE, "log", "log_interval tensorboard_log_interval tensorboard_queue_size peak_tflops"),
)

RANGES: Mapping[str, Range] = MappingProxyType(
    {f"{section}.{field}": range_ for range_, section, fields in _ROWS for field in fields.split()}
)


def out_of_range(config: RunConfig) -> Iterator[tuple[str, Problem]]:
    """(`section.field`, problem) of every number outside its range and every word outside its choices."""
    for name, option in by_name().items():
        if option.section == "command":
            continue
        value = getattr(getattr(config, option.section), option.field)
        if value is None:
            continue
        if name in RANGES and not RANGES[name].holds(value):
            yield name, Problem(flag_text(name, value), f"must be {RANGES[name].text}")
        elif option.choices and value not in option.choices:
            yield name, Problem(flag_text(name, value), "is not known", ", ".join(option.choices))
