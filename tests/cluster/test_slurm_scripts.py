"""The batch scripts where there is no SLURM: stand-ins for its commands start the processes of one node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "slurm"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sbatch"))
# The one process of a job; its output goes where --output says.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do case $1 in --output=*) log=${1#--output=} ;; esac; shift; done
SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 exec "$@" >"${log//%[nN]/0}" 2>&1
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = requeue ]; then echo "put back: $2"; else echo localhost; fi
"""


def test_scripts_are_shell() -> None:
    for script in SCRIPTS:
        done = subprocess.run(["bash", "-n", FOLDER / script], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and os.access(FOLDER / script, os.X_OK), done.stderr


@pytest.mark.parametrize("kind", ["", "_srun"])
def test_bert_asks_slurm_for_what_gpt_asks(kind: str) -> None:
    gpt, bert = ((FOLDER / f"pretrain_{name}{kind}.sbatch").read_text() for name in ("gpt", "bert"))
    asked = re.findall(r"^##?SBATCH .*$", gpt, re.MULTILINE)
    assert [line.replace("bert", "gpt") for line in re.findall(r"^##?SBATCH .*$", bert, re.MULTILINE)] == asked
    assert any("--signal" in line for line in asked) and "#SBATCH --requeue" in asked
    carried_out = f'PROGRAM=${{PROGRAM:-pretrain_bert.py}} exec examples/slurm/pretrain_gpt{kind}.sbatch "$@"'
    assert bert.splitlines()[-1] == carried_out


def test_bert_is_stopped_and_put_back(tiny_bert: list[str], tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    number = os.getpid() % 10000  # of the job; the scripts make a port of it
    own = {
        "SLURM_JOB_ID": str(number), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1",
        "SAVE": f"{tmp_path}/save", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    flags = [*tiny_bert, "--train-iters", "3", "--save-interval", "50", "--exit-interval", "2"]
    done = subprocess.run(
        [FOLDER / "pretrain_bert.sbatch", *flags],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    (path,) = (tmp_path / "save" / "logs").iterdir()
    log = path.read_text()
    assert done.stdout == f"attempt {number}.0 ended with status 75\nput back: {number}\n", done.stderr + log
    assert path.name == f"{number}.0-0-0.log" and log.startswith("nothing to resume") and "sop loss" in log
