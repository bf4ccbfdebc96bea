"""tools/draw_schedule.py as people call it: what it prints and writes, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str, columns: str = "100") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "COLUMNS": columns}
    command = [sys.executable, str(ROOT / "tools/draw_schedule.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def flags(schedule: str, stages: int, microbatches: int) -> list[str]:
    return ["--schedule", schedule, "--stages", str(stages), "--microbatches", str(microbatches)]


def test_json_with_profiled_costs():
    done = call(*flags("zb-h1", 8, 24), "--costs", "18.522,18.086,9.337,0.601", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found.keys() == {
        *("schedule", "stages", "microbatches", "chunks"),
        *("bubble_rate", "bubble_per_rank", "peak_activations", "makespan"),
    }
    assert (found["schedule"], found["stages"], found["microbatches"], found["chunks"]) == ("zb-h1", 8, 24, 1)
    assert round(found["bubble_rate"], 4) == 0.1585
    assert found["bubble_per_rank"] == pytest.approx([found["bubble_rate"]] * 8)
    assert found["peak_activations"] == [8] * 8


def test_default_costs_are_one_and_no_communication():
    found = json.loads(call(*flags("interleaved", 4, 8), "--chunks", "3", "--json").stdout)
    assert (found["makespan"], found["stages"], found["chunks"]) == (3 * 8 * 3 + 3 * 3, 4, 3)
    assert found["bubble_rate"] == pytest.approx(3 / (3 * 8 + 3))


def test_text_fits_the_terminal():
    done = call(*flags("1f1b", 3, 3), columns="70")
    assert done.returncode == 0
    assert "rank 2         F0 B0    F1 B1    F2 B2\n" in done.stdout
    assert all(len(line) <= 70 for line in call(*flags("gpipe", 4, 40), columns="70").stdout.splitlines()[1:5])


def test_output_is_an_svg(tmp_path):
    done = call(*flags("zb-v", 2, 4), "--output", str(tmp_path / "a.svg"), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["bubble_rate"] == pytest.approx(0)
    found = ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}rect")
    assert sum(rect.get("class") == "I" for rect in found) == 4 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (flags("2f2b", 4, 8), "unknown schedule 2f2b; known are gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v"),
        (flags("1f1b", 0, 8), "1f1b needs at least 1 of pipeline ranks, not 0"),
        ([*flags("1f1b", 4, 8), "--chunks", "2"], "1f1b has chunks per rank: 1, not 2"),
        ([*flags("1f1b", 4, 8), "--costs", "1,1,1"], "--costs 1,1,1: give four numbers F,B,W,COMM, for example 1,1,1,0"),
        ([*flags("1f1b", 4, 8), "--costs", "1,1,nan,0"], "cost of weight is nan"),
        ([*flags("1f1b", 4, 8), "--output", "/dev/null/a.svg"], "cannot be written: /dev/null is a device, not a directory"),
    ],
)
def test_bad_input_gets_one_message_and_exit_2(arguments, message):
    done = call(*arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr


def test_it_needs_no_torch():
    code = "import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path('tools/draw_schedule.py', run_name='__main__')\n"
    code += "except SystemExit: print('loaded:', *({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.splitlines()[-1] == "loaded:", done.stdout + done.stderr
