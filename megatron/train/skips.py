"""Count the steps that were skipped because a value was not finite, and tell a run that learnt nothing at its end."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.optim import OptimConfig
from megatron.optim.scaler import Dynamic
from megatron.train.errors import TrainingError
from megatron.train.report import StepReport
from megatron.train.state import TrainState

# So many skipped steps at the end of a run are a failure. A dynamic loss scale skips some that mean nothing: it looks for the
# largest scale without an overflow.
MIN_LOST = 2
MIN_LOST_DYNAMIC = 5


@dataclass
class SkipCounter:
    """The steps of one slice of a run. Those that --skip-train-iterations leaves out are no skipped ones."""

    steps: int = 0
    skipped: int = 0

    def count(self, report: StepReport) -> None:
        """Note a step."""
        if not report.left_out:
            self.steps += 1
            self.skipped += report.skipped

    def summary(self, state: TrainState) -> str | None:
        """Return the closing line of a slice; None where nothing was skipped."""
        if not self.skipped:
            return None
        last = state.consecutive_skips
        end = f"the last {last} in a row" if last else "none of them at the end"
        return (
            f"skipped: {self.skipped} of the {self.steps} steps since the start of this command, as something in them was not "
            f"finite; {end}"
        )


def check_skip(state: TrainState, report: StepReport, optim: OptimConfig) -> None:
    """Refuse a skipped step where --on-nonfinite says so, or where it is one too many in a row.

    Args:
        state: the counters, with the step in them.
        report: of that step, whose gradient was not finite.
        optim: the limits.

    Raises:
        TrainingError: training must not go on.
    """
    what = f"iteration {state.iteration}: the gradient is not finite (norm {report.grad_norm}, loss {report.lm_loss})"
    if report.nonfinite is not None:
        what += f": {report.nonfinite}"
    if optim.on_nonfinite == "abort":
        raise TrainingError(f"{what}; --on-nonfinite abort stops here. Lower --lr, or skip such steps with --on-nonfinite skip")
    if state.consecutive_skips >= optim.max_consecutive_skips:
        raise TrainingError(
            f"{what}, as in the {state.consecutive_skips - 1} steps before; --max-consecutive-skips stops here. "
            "Go on from an earlier checkpoint with a lower --lr"
        )


def learning_failure(state: TrainState) -> str | None:
    """Return the error of a run that is at its end and learnt nothing in its last steps, or in any; None where it did.

    Args:
        state: the counters at the end; they count skipped steps also of the slices before.
    """
    last = state.consecutive_skips
    dynamic = isinstance(state.scaler, Dynamic)
    never = last and not state.scheduled_samples
    if not never and last < (MIN_LOST_DYNAMIC if dynamic else MIN_LOST):
        return None
    if never:
        text = f"nothing was learnt at all: each of the {last} steps was skipped, because its gradient was not finite. "
    else:
        text = f"nothing was learnt in the last {last} steps, up to iteration {state.iteration}: they were skipped, because "
        text += "their gradients were not finite. "
    if dynamic and never:
        scale = f"The loss scale is {state.scaler.scale:g} now"
        return f"{text}{scale}: train for longer, or begin with a lower --initial-loss-scale"
    if not dynamic and state.scaler.scale != 1.0:
        text += f"The loss scale is {state.scaler.scale:g} throughout, as --loss-scale says: try a lower one. "
    return text + "Go on from a checkpoint before them, or begin anew, with a lower --lr"
