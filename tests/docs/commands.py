"""Runs a command as a user does, in the repository's root. Its python is the stand-in of `warm_start.py`, which has torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PYTHON = os.environ["WARM_PYTHON"]
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the given environment variables added, and return its output."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": PYTHON, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )
