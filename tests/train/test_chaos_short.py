"""The short form of `benchmarks/chaos.py`: three kills at random moments lose nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_three_kills_lose_nothing(tmp_path):
    """Two layouts, the first also with saving in the background."""
    short = ["--kills", "3", "--iterations", "12", "--layouts", "dp 2, distributed optimizer;pp 2"]
    command = [sys.executable, "benchmarks/chaos.py", *short, "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "kills: 3, " in done.stdout and "; lost: 0\n" in done.stdout and "what does not hold: 0;" in done.stdout
    compared = re.search(r"(\d+) lines of metrics, (\d+) steps' samples", done.stdout)
    assert compared is not None and int(compared[1]) >= 3 * 12 and int(compared[2]) >= 3 * 12 * 2
