"""Evaluate the model during training and at its end, by its losses on held-out samples and by a task's score."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron.config.batch import final_batch_size
from megatron.train.evaluate import Loader, evaluate
from megatron.train.loop import Hook, Training, is_due
from megatron.train.report import Evaluation, StepReport


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples of a split.

    Attributes:
        split: the name of the split, `validation` or `test`.
        open: opens a loader at the first sample, so that every evaluation reads the same samples.
    """

    split: str
    open: Callable[[], Loader]

    def evaluate(self, training: Training, title: str) -> None:
        """Evaluate the current model, and report the losses to the sinks. Collective. The state of training stays as it is.

        If the run is asked to stop during the evaluation, it is abandoned without a report, and `training.request` is set.

        Args:
            training: the state of the training loop.
            title: name of the evaluation on the console, such as `iteration 100`.
        """
        run = training.run
        run.job.watch.doing(f"opening the {self.split} data", alone=True)
        loader = self.open()
        try:
            losses = evaluate(
                run.pipeline,
                loader,
                run.mesh,
                steps=run.config.eval.eval_iters,
                global_batch_size=final_batch_size(run.config.batch),
                watch=run.job.watch,
                should_stop=training.should_stop,
            )
        finally:
            loader.close()  # ends its threads even when the evaluation fails
        if losses is None:
            return
        lm_loss, order_loss = losses
        sop_loss = order_loss if run.config.model.has_binary_head else None
        result = Evaluation(run.state.iteration, self.split, lm_loss, run.state.consumed_samples, sop_loss)
        for sink in training.sinks:
            sink.evaluation(result, title)


class Evaluate(Hook):
    """Makes the evaluations that are due. A resumed run first repeats the one that was abandoned for a stop.

    Args:
        validation: the samples whose loss is computed every --eval-interval iterations; None if there are none.
        score: measures and reports a task's score; it calls `training.should_stop` between its steps.
        score_interval: iterations between two scores.
    """

    def __init__(
        self,
        validation: HeldOut | None,
        score: Callable[[Training], object] | None = None,
        score_interval: int | None = None,
    ) -> None:
        self._validation, self._score, self._score_interval = validation, score, score_interval

    def before_training(self, training: Training) -> None:
        if training.run.state.evaluation_due and training.iteration < training.last_iteration:
            self._evaluate(training)

    def after_step(self, training: Training, report: StepReport) -> None:
        state, interval = training.run.state, training.run.config.eval.eval_interval
        validation_due = self._validation is not None and is_due(state.iteration, interval)
        goes_on = training.iteration < training.last_iteration
        # Saved in checkpoints, so that a run that stops before the evaluation makes it on resuming.
        state.evaluation_due = goes_on and (validation_due or self._score_due(state.iteration))
        if state.evaluation_due and training.request.stop is None:
            self._evaluate(training)

    def _score_due(self, iteration: int) -> bool:
        return self._score is not None and is_due(iteration, self._score_interval)

    def _evaluate(self, training: Training) -> None:
        iteration, interval = training.iteration, training.run.config.eval.eval_interval
        score_due = self._score_due(iteration)
        with training.timer.paused():
            # In a resumed run with other intervals, neither may be due at this iteration; then compute the validation loss.
            if self._validation is not None and interval and (is_due(iteration, interval) or not score_due):
                self._validation.evaluate(training, f"iteration {iteration}")
            if self._score is not None and score_due and training.request.stop is None:
                self._score(training)
        training.run.state.evaluation_due = training.request.stop is not None


def final_evaluations(training: Training, splits: Iterable[HeldOut]) -> None:
    """Evaluate the finished model on each split. Collective. If it is stopped, the next start repeats all of them."""
    config = training.run.config
    sample_count = f"{config.eval.eval_iters * final_batch_size(config.batch)}-sample draw"
    for held_out in splits:
        held_out.evaluate(training, f"iteration {training.iteration} on {sample_count} from {held_out.split} set")
        if training.request.stop is not None:
            return
