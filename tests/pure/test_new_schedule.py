"""A schedule that is added as CONTRIBUTING.md says, a function and its row, is known everywhere: nothing else knows names."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from legal_run import argv, problems

from megatron.pipeline.schedules import schedule as book
from megatron.pipeline.schedules.schedule import (
    SCHEDULES,
    Schedule,
    ScheduleKind,
    gpipe,
    looped,
    one_f_one_b,
    v_shaped,
    zero_bubble_h1,
)

ROOT = Path(__file__).parents[2]
BOOK = Path("megatron") / "pipeline" / "schedules" / "schedule.py"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project with two more schedules, written into the one file that CONTRIBUTING.md names."""
    root = tmp_path_factory.mktemp("project")
    for name in ("megatron", "tools"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_gpt.py", root)
    toys = (Path(__file__).parents[1] / "toy_schedules.py").read_text().split("# The functions\n")[1]
    functions, rows = toys.split("# The rows\n")
    text = (root / BOOK).read_text()
    kind, first = "@dataclass(frozen=True)\nclass ScheduleKind:", '        "gpipe": ScheduleKind('
    assert text.count(kind) == text.count(first) == 1
    added = "".join("    " + row for row in rows.splitlines(keepends=True)[1:-1])
    (root / BOOK).write_text(text.replace(kind, functions.strip() + "\n\n\n" + kind).replace(first, added + first))
    return root


# Carries out commands one after the other, in one process: [program, flag, ...] each.
DRIVER = """
import contextlib, io, json, runpy, sys
answers = []
for program, *flags in json.load(sys.stdin):
    sys.argv, out, err, status = [program, *flags], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    answers.append((status, out.getvalue(), err.getvalue()))
json.dump(answers, sys.stdout)
"""


def run_in_project(root: Path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each command in that project."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(answer) for answer in json.loads(done.stdout)]


def dry_run(change: str, *schedule: str) -> list[str]:
    flags = argv(f"--num-layers 4 --pipeline-model-parallel-size 2 --global-batch-size 8 --no:data-path {change}".strip())
    return ["pretrain_gpt.py", *flags, "--dry-run", "--world-size", "2", "--pipeline-schedule", *schedule]


def drawing_command(schedule: str, micro_batches: int) -> list[str]:
    counts = ["--stages", "2", "--microbatches", str(micro_batches)]
    return ["tools/draw_schedule.py", "--schedule", schedule, *counts, "--json"]


def test_dry_run_rules_and_drawing_know_what_a_new_row_says(project):
    ramp = "--no:train-iters --rampup-batch-size 4 2 100 --train-samples 200 --lr-decay-samples 200"
    planned, few, compiled, grows, *drawn, odd = run_in_project(
        project,
        dry_run("", "vee"),
        dry_run("--num-layers 3", "vee"),
        dry_run("", "vee", "--compile"),
        dry_run(ramp, "backwards"),
        drawing_command("vee", 4),
        drawing_command("backwards", 4),
        drawing_command("backwards", 3),
    )
    assert planned[0] == 0 and planned[2] == ""
    table = planned[1].split("# Parameters")[1].splitlines()[2:6]
    assert [line.split()[:2] for line in table] == [["0", "0"], ["1", "1"], ["2", "1"], ["3", "0"]]
    assert "vee: 2 ranks, 2 chunks each, 4 micro-batches" in planned[1]
    for (status, _, err), wrong in (
        (
            few,
            "`--pipeline-model-parallel-size 2` and `--pipeline-schedule vee` make 4 stages, and `--num-layers 3` leaves some "
            "of them empty; legal: --num-layers 4 or more, or --pipeline-model-parallel-size 1 or less",
        ),
        (
            compiled,
            "`--pipeline-schedule vee` conflicts with `--compile`: it computes weight gradients apart from the layers, which "
            "would break their graph; legal: backwards, gpipe, 1f1b or interleaved, or leave out --compile",
        ),
        (
            grows,
            "`--pipeline-schedule backwards` needs an even number of micro-batches; here a global batch of 6 makes "
            "3 micro-batches, on 2 pipeline ranks",
        ),
    ):
        assert status == 2 and wrong in err, err
    chunks = [(json.loads(out)["schedule"], json.loads(out)["chunks"]) for status, out, _ in drawn if status == 0]
    assert chunks == [("vee", 2), ("backwards", 1)]
    wrong = "error: backwards needs an even number of micro-batches, not 2 pipeline ranks, 3 micro-batches and 1 chunks\n"
    assert odd == (2, "", wrong)


def test_chunks_of_its_own_and_chosen_ones_do_not_go_together():
    own = "--num-layers 4 --pipeline-model-parallel-size 2 --pipeline-schedule zb-v --num-layers-per-virtual-pipeline-stage 1"
    assert problems(own, 2) == [
        "`--pipeline-schedule zb-v` always has 2 virtual stages on each rank, and conflicts with "
        "`--num-layers-per-virtual-pipeline-stage 1`; legal: --pipeline-schedule interleaved, or leave one of them out"
    ]


def test_a_row_that_does_not_say_what_its_function_does_is_refused(monkeypatch):
    def made(kind: ScheduleKind) -> Schedule:
        monkeypatch.setattr(book, "SCHEDULES", {"toy": kind})
        return book.make_schedule("toy", 2, 2)

    assert made(ScheduleKind(lambda p, m, v: gpipe(p, m))).name == "toy"
    with pytest.raises(ValueError, match="toy: its stages are on ranks"):
        made(ScheduleKind(lambda p, m, v: one_f_one_b(p, m), place=v_shaped, chunks=2))
    with pytest.raises(ValueError, match="toy: its row says 2 chunks per rank, and `place` gives 2 stages"):
        made(ScheduleKind(lambda p, m, v: gpipe(p, m), place=lambda p, v: looped(p, 1), chunks=2))
    with pytest.raises(ValueError, match="toy: its row says splits=False"):
        made(ScheduleKind(lambda p, m, v: zero_bubble_h1(p, m)))
    with pytest.raises(ValueError, match="toy: its row says splits=True"):
        made(ScheduleKind(lambda p, m, v: gpipe(p, m), splits=True))


def test_no_code_outside_the_book_names_a_schedule():
    """In a string on its own, as a comparison or a default would have it; or the beginning of names, as startswith would."""
    names = {*SCHEDULES, "zb-", "zb"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for folder in ("megatron", "tools", "tasks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / BOOK
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    ]
    assert not found
