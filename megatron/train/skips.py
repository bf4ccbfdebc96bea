"""Count the steps that were skipped because their gradient was not finite; fail a run with too many in a row."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.optim import OptimConfig
from megatron.optim.scaler import DynamicScaler
from megatron.train.errors import TrainingError
from megatron.train.report import StepReport
from megatron.train.state import TrainState

# A run whose last steps, this many or more, were all skipped has failed. A dynamic loss scale is allowed more, since its search
# for the largest scale without an overflow skips some steps.
MIN_FAILED_STEPS = 2
MIN_FAILED_STEPS_DYNAMIC = 5


@dataclass
class SkipCounter:
    """Counts the steps of one slice of a run, and the skipped ones among them; --skip-train-iterations does not count."""

    steps: int = 0
    skipped: int = 0

    def count(self, report: StepReport) -> None:
        """Count a step."""
        if not report.left_out:
            self.steps += 1
            self.skipped += report.skipped

    def summary(self, state: TrainState) -> str | None:
        """Return the line for the end of a slice; None if no step was skipped."""
        if not self.skipped:
            return None
        last = state.consecutive_skips
        end = f"the last {last} steps were all skipped" if last else "the last step was not"
        return (
            f"skipped: {self.skipped} of the {self.steps} steps since the start of this command, because a value was not "
            f"finite; {end}"
        )


def check_skip(state: TrainState, report: StepReport, optim: OptimConfig) -> None:
    """Stop training after a skipped step if --on-nonfinite is abort, or --max-consecutive-skips is reached.

    Args:
        state: the counters, which include the skipped step.
        report: the report of the step, whose gradient was not finite.
        optim: contains the two settings.

    Raises:
        TrainingError: training must stop.
    """
    what = f"iteration {state.iteration}: the gradient is not finite (norm {report.grad_norm}, loss {report.lm_loss})"
    if report.nonfinite is not None:
        what += f": {report.nonfinite}"
    if optim.on_nonfinite == "abort":
        raise TrainingError(f"{what}; --on-nonfinite abort stops here. Lower --lr, or skip such steps with --on-nonfinite skip")
    if state.consecutive_skips >= optim.max_consecutive_skips:
        raise TrainingError(
            f"{what}, as in the {state.consecutive_skips - 1} steps before; --max-consecutive-skips stops here. "
            "Resume from an earlier checkpoint with a lower --lr"
        )


def learning_failure(state: TrainState) -> str | None:
    """Return the error message for a finished run whose last steps, or all of them, were skipped; None otherwise.

    Args:
        state: the counters at the end, which include the slices before this one.
    """
    last = state.consecutive_skips
    dynamic = isinstance(state.scaler, DynamicScaler)
    no_update = last and not state.scheduled_samples  # the whole run was without an update
    if not no_update and last < (MIN_FAILED_STEPS_DYNAMIC if dynamic else MIN_FAILED_STEPS):
        return None
    if no_update:
        text = f"nothing was learnt: all {last} steps were skipped, because their gradients were not finite. "
    else:
        text = f"nothing was learnt in the last {last} steps, up to iteration {state.iteration}: they were skipped, because "
        text += "their gradients were not finite. "
    if dynamic and no_update:
        scale = f"The loss scale is {state.scaler.scale:g} now"
        return f"{text}{scale}: train for longer, or begin with a lower --initial-loss-scale"
    if not dynamic and state.scaler.scale != 1.0:
        text += f"The loss scale is {state.scaler.scale:g} throughout, set by --loss-scale: try a lower one. "
    return text + "Resume from an earlier checkpoint, or start a new run, with a lower --lr"
