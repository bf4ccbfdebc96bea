"""Settings of what a run tells."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron.config.check import Rules
from megatron.config.option import POSITIVE, option
from megatron.config.paths import within


@dataclass(frozen=True)
class LogConfig:
    """Metrics, and the places that they go to."""

    log_interval: int = option(100, "steps between console and metrics lines", legal=POSITIVE)
    metrics_path: str | None = option(None, "JSON lines, one object a line; default metrics.jsonl in --save")
    tensorboard_dir: str | None = option(None, "directory for TensorBoard")
    tensorboard_log_interval: int = option(1, "steps between TensorBoard points", legal=POSITIVE)
    tensorboard_queue_size: int = option(1000, "points held before they are written", legal=POSITIVE)
    wandb_project: str | None = option(
        None, "project of Weights & Biases to log to, beside TensorBoard and under its tags; needs the extra `wandb`"
    )
    wandb_exp_name: str | None = option(None, "name of the run in W&B; default one that W&B makes up")
    wandb_entity: str | None = option(None, "user or team of W&B; default the user's own")
    wandb_save_dir: str | None = option(None, "directory for W&B's files; default `wandb` in --save, else here")
    log_params_norm: bool = option(False, "also log the norm of the parameters")
    log_num_zeros_in_grad: bool = option(False, "also log the number of zeros in the gradient")
    log_learning_rate_to_tensorboard: bool = option(
        True,
        "learning rate to TensorBoard",
        off="--no-log-learnig-rate-to-tensorboard",
        aliases=("--no-log-learning-rate-to-tensorboard",),
    )
    log_loss_scale_to_tensorboard: bool = option(
        True,
        "loss scale to TensorBoard",
        off="--no-log-loss-scale-to-tensorboard",
        aliases=("--disable-log-loss-scale-to-tensorboard",),
    )
    log_batch_size_to_tensorboard: bool = option(False, "batch size to TensorBoard")
    log_world_size_to_tensorboard: bool = option(False, "world size to TensorBoard")
    log_memory_to_tensorboard: bool = option(False, "memory use to TensorBoard")
    log_validation_ppl_to_tensorboard: bool = option(False, "validation perplexity to TensorBoard")
    profile_pipeline: str | None = option(
        None,
        "measure the pipeline's actions and write times and a picture to DIR; default --save, else ./pipeline_profile",
        metavar="[DIR]",
        bare="",
    )
    peak_tflops: float | None = option(
        None,
        "dense peak of one device in TFLOP/s, for MFU; default from the device's name. MFU counts attention over the whole "
        "square, mfu_causal its causal half, as NVIDIA's tables do",
        legal=POSITIVE,
    )


def derive_log(log: LogConfig, save: str | None) -> LogConfig:
    """Fill in the places of files that lie in the directory of --save."""
    profile = log.profile_pipeline  # the flag alone is the empty word
    return replace(
        log,
        wandb_project=log.wandb_project or None,  # an empty one turns W&B off, as in Megatron-LM
        wandb_save_dir=log.wandb_save_dir or (within(save, "wandb") if log.wandb_project else None),
        metrics_path=log.metrics_path or within(save, "metrics.jsonl"),
        profile_pipeline=(save or "pipeline_profile") if profile == "" else profile,
    )


RULES = Rules()
