"""Hooks between the steps of a run: the steps at which each acts, and those at which it does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron.config.schema import BatchConfig, CheckpointConfig, EvalConfig
from megatron.train.hooks.evaluate import Evaluate
from megatron.train.hooks.save import Save
from megatron.train.hooks.skips import LogSkips
from megatron.train.hooks.stop import AgreeOnStop, ExitInterval
from megatron.train.loop import Training
from megatron.train.report import StepReport
from megatron.train.skips import SkipCounter
from megatron.train.state import TrainState
from megatron.train.stopping import Request

LAST = 8
REPORT = StepReport(1.0, 1.0, skipped=False, nan=False, samples=4, tokens=8)


class FakeStopping:
    """Answers in the given order, and records what it was asked."""

    def __init__(self, *answers: Request) -> None:
        self.answers, self.asked, self.saves = list(answers), [], 0

    def ask(self, seconds=None, *, save_due=False) -> Request:
        self.asked.append((seconds, save_due))
        return self.answers.pop(0) if self.answers else Request()

    def saved(self) -> None:
        self.saves += 1


class FakeClock:
    """Seconds that a test moves on."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    """Time as the timers see it: it passes when a test says so."""
    made = FakeClock()
    monkeypatch.setattr("time.perf_counter", lambda: made.now)
    return made


class Sink:
    def __init__(self) -> None:
        self.events = []

    def event(self, text) -> None:
        self.events.append(text)


def training_at(iteration: int, *answers: Request, exit_interval=None, eval_interval=2, save_interval=3) -> Training:
    config = SimpleNamespace(
        batch=BatchConfig(micro_batch_size=2, global_batch_size=4, train_iters=LAST, exit_interval=exit_interval),
        eval=EvalConfig(eval_interval=eval_interval),
        checkpoint=CheckpointConfig(save_interval=save_interval),
    )
    run = SimpleNamespace(config=config, state=TrainState(iteration=iteration))
    return Training(run, None, [Sink()], FakeStopping(*answers), start=0)


class RecordingEvaluation:
    """Held-out samples whose evaluation is only written down, and takes five seconds of the clock."""

    def __init__(self, made: list[str], clock: FakeClock) -> None:
        self.made, self.clock = made, clock

    def evaluate(self, training, title) -> None:
        self.made.append(title)
        self.clock.now += 5.0
        training.should_stop()


STOP = Request("enough", save=True)


def test_a_stop_in_the_last_step_counts_only_where_evaluations_follow():
    for iteration, follow, stops in ((LAST, False, False), (LAST, True, True), (LAST - 1, False, True)):
        training, hook = training_at(iteration, STOP), AgreeOnStop(evaluations_follow=follow)
        hook.after_step(training, REPORT)
        assert training.request == STOP
        hook.after_training(training)
        assert (training.request.stop is not None) == stops, (iteration, follow)


def test_the_ranks_agree_with_the_seconds_of_the_step_and_whether_a_save_is_due(clock):
    training, hook = training_at(3), AgreeOnStop(evaluations_follow=True)
    clock.now += 7.0
    hook.after_step(training, REPORT)
    training.run.state.iteration = 4
    hook.after_step(training, REPORT)
    (seconds, due), (_, later) = training.stopping.asked
    assert seconds == 7.0 and due and not later


def test_the_exit_interval_stops_between_the_ends_and_overrules_no_other_stop():
    for iteration, before, why in (
        (4, Request(), "--exit-interval 4"),
        (3, Request(), None),
        (LAST, Request(), None),
        (4, STOP, "enough"),
    ):
        training = training_at(iteration, exit_interval=4)
        training.request = before
        ExitInterval().after_step(training, REPORT)
        assert training.request.stop == why and training.request.save == (why is not None)


def test_evaluations_are_made_when_they_are_due_and_are_no_training_time(clock):
    made, scored = [], []
    hook = Evaluate(RecordingEvaluation(made, clock), lambda training: scored.append(training.iteration), 3)
    for iteration in range(1, LAST + 1):
        training = training_at(iteration)
        began = training.timer.now()
        hook.after_step(training, REPORT)
        assert training.timer.now() == began and not training.run.state.evaluation_due
    assert made == ["iteration 2", "iteration 4", "iteration 6"] and scored == [3, 6], "the last one is made at the end"


def test_what_was_given_up_is_made_first_by_the_resumed_run(clock):
    made, scored = [], []
    hook = Evaluate(RecordingEvaluation(made, clock), lambda training: scored.append(training.iteration), 6)
    stopped = training_at(6, STOP)
    hook.after_step(stopped, REPORT)
    assert stopped.request == STOP and stopped.run.state.evaluation_due and made == ["iteration 6"] and not scored
    before = training_at(6)
    before.request = STOP  # it was to stop already, so nothing is begun
    hook.after_step(before, REPORT)
    assert before.run.state.evaluation_due and len(made) == 1
    resumed = training_at(6)
    hook.before_training(resumed)
    assert len(made) == 1, "none was due"
    resumed.run.state.evaluation_due = True
    hook.before_training(resumed)
    assert made == ["iteration 6"] * 2 and scored == [6] and not resumed.run.state.evaluation_due


def test_an_evaluation_keeps_a_request_to_save(clock):
    training = training_at(2)
    training.request = Request(save=True)
    Evaluate(RecordingEvaluation([], clock)).after_step(training, REPORT)
    assert training.request == Request(save=True)


def test_checkpoints_are_written_at_their_interval_on_request_and_at_the_end_once(clock):
    saves = []

    def save() -> None:
        saves.append(training.iteration)
        clock.now += 5.0

    hook = Save(SimpleNamespace(save=save))
    training = training_at(0)
    hook.before_training(training)
    hook.after_training(training)
    assert not saves, "nothing new"
    for iteration in range(1, LAST + 1):
        training.run.state.iteration = iteration
        training.request = Request(save=iteration == 5)
        began = training.timer.now()
        hook.after_step(training, REPORT)
        assert training.timer.now() == began
    hook.after_training(training)
    assert saves == [3, 5, 6, LAST] and training.stopping.saves == 3
    training.run.state.iteration = 9
    hook.after_step(training, REPORT)
    hook.after_training(training)
    assert saves == [3, 5, 6, LAST, 9], "once, where the last one is due anyway"
    training.run.state.iteration, training.request = 10, STOP
    hook.after_training(training)
    assert saves[-1] == 9, "a stop sees to its checkpoint itself"


def test_steps_without_an_update_are_told():
    skips, training = SkipCounter(), training_at(4)
    hook = LogSkips(skips)
    for report in (
        REPORT,
        StepReport(1.0, 1.0, skipped=True, nan=False, samples=4, tokens=8),
        StepReport(0.0, 0.0, skipped=True, nan=False, samples=4, tokens=8, left_out=True),
        StepReport(1.0, 1.0, skipped=False, nan=True, samples=4, tokens=8, nonfinite="the loss is not finite"),
    ):
        hook.after_step(training, report)
    assert training.sinks[0].events == [
        "iteration 4: skipped: the norm of the gradient is not finite; loss scale 1 from now on",
        "iteration 4: left out by --skip-train-iterations; its samples are not trained on",
        "iteration 4: the loss is not finite; the gradient is finite, so the update was made",
    ]
    assert (skips.steps, skips.skipped) == (3, 1)
