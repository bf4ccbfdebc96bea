"""Report every step to the sinks, and the averages over every --log-interval steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron.config.schema import RunConfig
from megatron.train.loop import Hook, Training, is_due
from megatron.train.report import LogContext, Metrics, StepReport, causal_share, peak_tflops, sample_flops


class Log(Hook):
    """Computes the metrics of steps and sends them to the sinks.

    Args:
        config: the resolved configuration.
        device: the device of this rank; MFU is relative to its peak FLOP/s.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._interval, self._device = config.log.log_interval, device
        self._flops, self._causal_share = sample_flops(config), causal_share(config)
        self._peak = peak_tflops(device, config.log.peak_tflops)
        self._line_began = self._step_began = 0.0  # times on the training timer
        self._steps = self._tokens = self._samples = 0  # of the steps since the last log line

    def before_training(self, training: Training) -> None:
        self._line_began = self._step_began = training.timer.now()

    def after_step(self, training: Training, report: StepReport) -> None:
        now = training.timer.now()
        if not report.left_out:
            self._steps += 1
            self._tokens += report.tokens
            self._samples += report.samples
        line_due = is_due(training.iteration, self._interval)
        if training.sinks:
            context = self._context(training, report, now - self._line_began)
            self._log_step(training, report, now - self._step_began, context)
            if line_due:
                self._log_line(training, report, now - self._line_began, context)
        self._step_began = now
        if line_due:
            training.run.state.start_window()
            self._line_began, self._steps, self._tokens, self._samples = now, 0, 0, 0

    def _log_step(self, training: Training, report: StepReport, seconds: float, context: LogContext) -> None:
        """Send the values of one step to the sinks."""
        metrics = self._metrics(training, report, seconds, int(not report.left_out), report.tokens, report.samples)
        if not report.skipped:
            metrics = replace(metrics, lm_loss=report.lm_loss, sop_loss=report.sop_loss)
        for sink in training.sinks:
            sink.step(metrics, context)

    def _log_line(self, training: Training, report: StepReport, seconds: float, context: LogContext) -> None:
        """Send the averages since the last log line to the sinks."""
        state = training.run.state
        metrics = self._metrics(training, report, seconds, self._steps, self._tokens, self._samples)
        if state.window_steps:
            metrics = replace(metrics, lm_loss=state.window_loss / state.window_steps)
            if training.run.config.model.has_binary_head:
                metrics = replace(metrics, sop_loss=state.window_sop / state.window_steps)
        for sink in training.sinks:
            sink.line(metrics, context)

    def _context(self, training: Training, report: StepReport, elapsed: float) -> LogContext:
        state, schedule = training.run.state, training.run.schedule
        remaining = training.last_iteration - state.iteration
        return LogContext(
            global_batch_size=report.samples,
            train_iters=training.last_iteration,
            world_size=training.run.job.env.world_size,
            zeros=report.zeros,
            params_norm=report.params_norm,
            eta_seconds=elapsed / self._steps * remaining if self._steps else None,
            skipped_samples=state.skipped_samples,
            decoupled_lr=schedule.decoupled_rate(state.scheduled_samples) if schedule.decoupled else None,
        )

    def _metrics(
        self, training: Training, report: StepReport, seconds: float, steps: int, tokens: int, samples: int
    ) -> Metrics:
        """Return the metrics of `steps` steps that took `seconds` in all, without losses. Left-out steps are not counted."""
        run, state, causal_share = training.run, training.run.state, self._causal_share
        # `samples` counts the samples of all ranks, so their FLOPs are divided by the number of ranks.
        tflops = self._flops * samples / seconds / run.job.env.world_size / 1e12 if steps else None
        mfu = tflops / self._peak if tflops is not None and self._peak else None
        on_gpu = self._device.type == "cuda"
        return Metrics(
            iteration=state.iteration,
            lm_loss=None,
            sop_loss=None,
            grad_norm=None if report.left_out else report.grad_norm,
            learning_rate=run.schedule.rate(state.scheduled_samples),
            loss_scale=state.scaler.scale,
            skipped_iterations=state.window_skipped,
            nan_iterations=state.window_nan,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            iteration_time_ms=1000.0 * seconds / steps if steps else None,
            tokens_per_second=tokens / seconds if steps else None,
            tflops_per_gpu=tflops,
            mfu=mfu,
            mfu_causal=None if mfu is None or causal_share is None else mfu * causal_share,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            extra=dict(training.extra_metrics),
        )
