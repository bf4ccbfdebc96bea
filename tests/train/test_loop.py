"""The training loop is a page that one reads: it stays short, and calls the hooks in their order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from source_files import tree

from megatron.config.schema import BatchSettings
from megatron.train.errors import TrainingError
from megatron.train.loop import Hook, StepTimer, Training, train
from megatron.train.report import StepReport
from megatron.train.state import TrainState
from megatron.train.stopping import Request

MAX_LOOP_LINES = 25


class FakeLoader:
    """A loader whose micro-batches are their own number."""

    def next_batches(self, size):
        return [size]

    def close(self):
        pass


class RecordingHook(Hook):
    """Records when it is called; stops after an iteration."""

    def __init__(self, name, calls, stop_after=None):
        self.name, self.calls, self.stop_after = name, calls, stop_after

    def before_training(self, training):
        self.calls.append(f"before {self.name}")

    def after_step(self, training, report):
        self.calls.append(f"{training.iteration} {self.name}")
        if training.iteration == self.stop_after:
            training.request = Request("enough")

    def after_training(self, training):
        self.calls.append(f"after {self.name}")


def build_training(iterations, step=None, start=0):
    batch = BatchSettings(global_batch_size=4, train_iters=iterations)
    optim = SimpleNamespace(on_nonfinite="abort")
    job = SimpleNamespace(watch=SimpleNamespace(doing=lambda what, alone: None))
    plain = StepReport(1.0, 1.0, skipped=False, nan=False, samples=4, tokens=8)
    run = SimpleNamespace(
        config=SimpleNamespace(batch=batch, optim=optim),
        state=TrainState(iteration=start),
        job=job,
        step=lambda batches, state: step or plain,
    )
    return Training(run, FakeLoader(), [], None, start=start)


def test_the_loop_is_short():
    (loop,) = (node for node in tree(Path(train.__code__.co_filename)).body if getattr(node, "name", "") == "train")
    assert loop.end_lineno - loop.lineno < MAX_LOOP_LINES


def test_hooks_are_called_in_their_order():
    calls = []
    train(build_training(2), [RecordingHook("a", calls), RecordingHook("b", calls)])
    assert calls == ["before a", "before b", "1 a", "1 b", "2 a", "2 b", "after a", "after b"]


def test_a_hook_ends_training_and_the_others_are_still_called():
    calls, training = [], build_training(9)
    train(training, [RecordingHook("a", calls, stop_after=1), RecordingHook("b", calls)])
    assert calls == ["before a", "before b", "1 a", "1 b", "after a", "after b"]
    assert training.request.stop == "enough" and training.iteration == 1


def test_a_request_before_the_first_step_and_a_run_at_its_end_take_no_step():
    stopped, calls = build_training(3), []
    stopped.request = Request("enough")
    train(stopped, [RecordingHook("a", calls)])
    train(build_training(3, start=3), [RecordingHook("a", calls)])
    assert calls == ["before a", "after a"] * 2 and stopped.iteration == 0


def test_an_error_ends_training_before_the_hooks_of_its_step():
    calls = []
    bad = StepReport(float("nan"), float("nan"), skipped=True, nan=True, samples=4, tokens=8)
    with pytest.raises(TrainingError, match="--on-nonfinite abort"):
        train(build_training(3, step=bad), [RecordingHook("a", calls)])
    assert calls == ["before a"]


def test_a_paused_timer_stands_still(monkeypatch):
    clock = iter([10.0, 11.0, 21.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = StepTimer()
    began = timer.now()
    with timer.paused():
        pass
    assert timer.now() - began == 2.0
