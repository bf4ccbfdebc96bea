"""Settings of logging: which metrics are logged, and where to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron.config.check import Rules
from megatron.config.option import POSITIVE, option
from megatron.config.paths import path_in_save


@dataclass(frozen=True)
class LogConfig:
    """Metrics that are logged, and where to."""

    log_interval: int = option(100, "iterations between lines on the console and in the metrics file", legal=POSITIVE)
    metrics_path: str | None = option(None, "metrics file, one JSON object per line (default: metrics.jsonl in --save)")
    tensorboard_dir: str | None = option(None, "directory of TensorBoard's event files")
    tensorboard_log_interval: int = option(1, "iterations between points in TensorBoard", legal=POSITIVE)
    tensorboard_queue_size: int = option(
        1000, "points that TensorBoard's writer holds in memory before it writes them", legal=POSITIVE
    )
    wandb_project: str | None = option(
        None, "Weights & Biases project to log to, under the tags of TensorBoard; needs the extra `wandb`"
    )
    wandb_exp_name: str | None = option(None, "name of the run in W&B (default: chosen by W&B)")
    wandb_entity: str | None = option(None, "W&B user or team that owns the project (default: the user logged in)")
    wandb_save_dir: str | None = option(
        None, "directory for W&B's files (default: `wandb` in --save, or in the working directory)"
    )
    log_params_norm: bool = option(False, "log the L2 norm of all parameters")
    log_num_zeros_in_grad: bool = option(False, "log the number of zeros in the gradients")
    log_learning_rate_to_tensorboard: bool = option(
        True,
        "logging of the learning rate to TensorBoard",
        off_flag="--no-log-learnig-rate-to-tensorboard",
        aliases=("--no-log-learning-rate-to-tensorboard",),
    )
    log_loss_scale_to_tensorboard: bool = option(
        True,
        "logging of the loss scale to TensorBoard",
        off_flag="--no-log-loss-scale-to-tensorboard",
        aliases=("--disable-log-loss-scale-to-tensorboard",),
    )
    log_batch_size_to_tensorboard: bool = option(False, "log the global batch size to TensorBoard")
    log_world_size_to_tensorboard: bool = option(False, "log the number of ranks to TensorBoard")
    log_memory_to_tensorboard: bool = option(False, "log the device's memory use to TensorBoard")
    log_validation_ppl_to_tensorboard: bool = option(False, "log the validation perplexity to TensorBoard")
    profile_pipeline: str | None = option(
        None,
        "time the actions of the pipeline in a few steps, and write the times and a drawing to DIR (default: --save, or "
        "./pipeline_profile)",
        metavar="[DIR]",
        bare="",
    )
    peak_tflops: float | None = option(
        None,
        "dense peak of one device in TFLOP/s, for the MFU; MFU counts the whole square of attention, mfu_causal its causal "
        "half, as NVIDIA's tables do (default: from a table of devices)",
        legal=POSITIVE,
    )


def derive_log(log: LogConfig, save: str | None) -> LogConfig:
    """Fill in the paths that default to the directory of --save, and turn W&B off if its project name is empty."""
    profile = log.profile_pipeline  # "" if the flag was given without a value, see `bare` in the declaration above
    return replace(
        log,
        wandb_project=log.wandb_project or None,  # as in Megatron-LM
        wandb_save_dir=log.wandb_save_dir or (path_in_save(save, "wandb") if log.wandb_project else None),
        metrics_path=log.metrics_path or path_in_save(save, "metrics.jsonl"),
        profile_pipeline=(save or "pipeline_profile") if profile == "" else profile,
    )


RULES = Rules()
