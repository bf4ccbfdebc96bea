"""A schedule that somebody has written wrong is refused in words, before a run begins and where it would be run."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from reference import GPT2, Setting, micro_batches, start_run
from test_mock_data import FLAGS

from megatron.cli.program import pretrain
from megatron.pipeline.schedules import schedule as book
from megatron.pipeline.schedules.schedule import Schedule, ScheduleKind, gpipe


def shortened(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """GPipe without the first rank's last action."""
    first, *others = (made := gpipe(ranks, micro_batches)).programs
    return replace(made, programs=(first[:-1], *others))


def reversed_(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """GPipe from its end to its beginning."""
    made = gpipe(ranks, micro_batches)
    return replace(made, programs=tuple(program[::-1] for program in made.programs))


WRONG = {
    shortened: "stage 0 runs F for micro-batch",
    reversed_: "wait",
}


@pytest.fixture(params=WRONG, ids=lambda make: make.__name__)
def wrong(request, monkeypatch) -> str:
    """Put a wrong schedule in gpipe's row; return words of the message about it."""
    monkeypatch.setattr(book, "SCHEDULES", MappingProxyType({**book.SCHEDULES, "gpipe": ScheduleKind(request.param)}))
    return WRONG[request.param]


def run_and_fail(capsys, *flags: str) -> str:
    try:
        status = pretrain([*FLAGS, "--pipeline-schedule", "gpipe", *flags], program="pretrain_gpt.py", defaults={})
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    assert status == 2 and "iteration" not in said.out and "Traceback" not in said.err
    return said.err


def test_a_run_and_a_dry_run_refuse_it(wrong, tmp_path, capsys):
    said = run_and_fail(capsys, "--save", str(tmp_path / "save"), "--save-interval", "2")
    assert "error: `--pipeline-schedule gpipe` cannot be run: gpipe: " in said and wrong in said
    assert not (tmp_path / "save").exists()
    said = run_and_fail(
        capsys, "--dry-run", "--world-size", "2", "--pipeline-model-parallel-size", "2", "--micro-batch-size", "4"
    )
    assert "error: `--pipeline-schedule gpipe` cannot be run: gpipe: " in said and wrong in said


def test_the_executor_runs_no_such_schedule(wrong):
    setting = Setting(GPT2, schedule="gpipe")
    run = start_run(setting, 1)
    with pytest.raises(ValueError, match=wrong):
        run.step(micro_batches(setting, 127, 0, 0, 1), run.state)
