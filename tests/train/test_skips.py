"""A run that learnt nothing at its end says so, and is a failure; what a loss scale skips while it is sought is not."""

from __future__ import annotations

import json

import pytest
from test_program import run

from megatron.optim.scaler import ConstantScaler, DynamicScaler
from megatron.train.report import StepReport
from megatron.train.skips import SkipCounter, learning_failure
from megatron.train.state import TrainState

DYNAMIC = DynamicScaler(2.0**32, 1.0, 1000, 2)


@pytest.mark.parametrize(
    ("scaler", "learnt", "last", "said"),
    [
        (ConstantScaler(), 8, 0, None),
        (ConstantScaler(), 8, 1, None),
        (ConstantScaler(), 8, 2, "nothing was learnt in the last 2 steps, up to iteration 20"),
        (ConstantScaler(128.0), 0, 1, "nothing was learnt: all 1 steps"),
        (ConstantScaler(1e30), 0, 3, "The loss scale is 1e+30 throughout, set by --loss-scale: try a lower one"),
        (DYNAMIC, 8, 4, None),
        (DYNAMIC, 8, 5, "nothing was learnt in the last 5 steps, up to iteration 20"),
        (DYNAMIC, 0, 0, None),
        (DYNAMIC, 0, 3, "begin with a lower --initial-loss-scale"),
    ],
)
def test_how_many_steps_are_too_many(scaler, learnt, last, said):
    found = learning_failure(TrainState(iteration=20, scheduled_samples=learnt, consecutive_skips=last, scaler=scaler))
    assert found is None if said is None else said in found


def test_the_closing_line_counts_the_steps_of_its_slice():
    skips, state = SkipCounter(), TrainState()
    assert skips.summary(state) is None
    for skipped, left_out in ((True, False), (False, False), (True, True), (True, False)):
        skips.count(StepReport(1.0, 1.0, skipped=skipped, nan=False, samples=1, tokens=8, left_out=left_out))
    assert "skipped: 2 of the 3 steps" in skips.summary(state) and "the last step was not" in skips.summary(state)
    state.consecutive_skips = 7  # some before this slice began
    assert "the last 7 steps were all skipped" in skips.summary(state)


def test_a_run_that_learnt_nothing_at_its_end_fails_with_its_checkpoint(flags, tmp_path, capsys):
    far = [*flags, "--lr", "1e18", "--lr-warmup-iters", 0, "--eval-iters", 0]
    assert run(far) == 1
    said = capsys.readouterr()
    assert (
        "skipped: 11 of the 12 steps since the start of this command, because a value was not finite; the last 11" in said.out
    )
    assert said.err.count("error: ") == 1
    assert "error: nothing was learnt in the last 11 steps, up to iteration 12: they were skipped" in said.err
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "12\n"
    assert json.loads((tmp_path / "run" / "progress.json").read_text())["finished"] is None
    assert run([*far, "--auto-resume"]) == 1  # asked again, it does not say that all is well
    assert "nothing was learnt in the last 11 steps" in capsys.readouterr().err


def test_a_run_that_is_stopped_says_what_was_skipped(flags, capsys):
    assert run([*flags, "--lr", "1e18", "--lr-warmup-iters", 0, "--exit-interval", 4]) == 75
    assert "skipped: 3 of the 4 steps" in capsys.readouterr().out
    # Without --save a stop on request is the end, too.
    far = [*flags, "--lr", "1e18", "--lr-warmup-iters", 0, "--exit-interval", 4]
    without = {"--save", "--save-interval"}
    assert run([flag for name, flag in zip(["", *far], far, strict=False) if not {name, flag} & without]) == 1
    said = capsys.readouterr().err
    assert (
        "error: stopping after iteration 4: --exit-interval 4; nothing was learnt in the last 3 steps, up to iteration 4"
        in said
    )


def test_a_loss_scale_of_any_size_is_resumed(flags, tmp_path, capsys):
    """A state that a run has saved is never called one that no run saves."""
    huge = [*flags, "--fp16", "--initial-loss-scale", "1e30", "--eval-iters", 0]
    assert run([*huge, "--exit-interval", 1]) == 75
    assert run([*huge, "--exit-interval", 2, "--auto-resume"]) == 75, capsys.readouterr().err
