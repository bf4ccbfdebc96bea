"""One rank fails in any phase of a run: all end in time, with one cause that names rank, host, phase and what happened."""

from __future__ import annotations

import os
import signal

import pytest

HOST = os.uname().nodename
# The phase as it is told: in the words of the rank itself, or of those that saw it die.
WORDS = {
    "arg check": "reading the command",
    "dataset build": "building the datasets",
    "model build": "building the model",
    "restore": "loading the checkpoint",
    "forward": "forward of micro-batch 0",
    "backward": "backward of micro-batch 0",
    "optimizer": "the optimizer's step",
    "save": "collecting a checkpoint",
    "eval": "reading held-out data",
}


@pytest.mark.parametrize("how", ["exception", "exit", "SIGKILL"])
@pytest.mark.parametrize("phase", WORDS)
def test_a_fault_in_any_phase_gives_one_error(slices, flags, phase, how):
    if how == "exit" and phase not in ("dataset build", "save"):
        pytest.skip("to the others the same as SIGKILL")
    ended = slices([*flags, "--train-iters", "5", "--eval-interval", "2"], fault=(1, phase, 1, how))
    if phase == "arg check" and how != "exception":  # nobody watches yet; the launcher saw it, and ends the others
        assert ended.statuses[1] != 0 and ended.statuses[0] == 75 and ended.seconds < 30.0
        return
    own = {"exception": 1, "exit": 9, "SIGKILL": -signal.SIGKILL}[how]
    assert (
        ended.statuses[1] == own and ended.statuses[0] in ((1,) if phase != "arg check" else (1, 75)) and ended.seconds < 30.0
    ), ended
    assert len(ended.errors) == 1, ended.err
    (error,) = ended.errors
    assert f"rank 1 on host {HOST}, " in error and WORDS[phase] in error
    what = "ValueError: made to fail" if how == "exception" else "its process died without a message"
    assert what in error and ended.err.count("Traceback") == (how == "exception")
    told = [phase != "arg check", how == "exception"]  # the ranks that could still say it
    assert all(left == error for left, could in zip(ended.left, told, strict=True) if could), "torchrun's report has it too"
