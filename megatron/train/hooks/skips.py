"""Count the steps without an update, and log a line about each."""

from __future__ import annotations

from megatron.train.loop import Hook, Training
from megatron.train.report import StepReport
from megatron.train.skips import SkipCounter
from megatron.train.state import TrainState


class LogSkips(Hook):
    """Counts the steps without an update, and logs each of them with the reason."""

    def __init__(self, skips: SkipCounter) -> None:
        self._skips = skips

    def after_step(self, training: Training, report: StepReport) -> None:
        self._skips.count(report)
        if (text := _describe_skip(training.run.state, report)) is not None:
            training.log(f"iteration {training.iteration}: {text}")


def _describe_skip(state: TrainState, report: StepReport) -> str | None:
    """Return the text about a step that was skipped, or in which a value was not finite; None for any other step."""
    if report.left_out:
        return "left out by --skip-train-iterations; its samples are not trained on"
    if report.skipped:
        text = f"skipped: {report.nonfinite or 'the norm of the gradient is not finite'}"
        return f"{text}; loss scale {state.scaler.scale:g} from now on"
    if report.nonfinite is not None:
        return f"{report.nonfinite}; the gradient is finite, so the update was made"
    return None
