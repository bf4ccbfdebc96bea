"""A pretraining run of two stages in which one rank dies or hangs in an action: one error, with rank, stage and action."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Runs pretrain_gpt with a fault in one action of one rank; FAULT says what, in words of the executor.
PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import megatron.pipeline.executor as executor
from megatron.cli.program import pretrain
plain, seen = executor.Executor._forward, []
def forward(self, action, x):
    if os.environ["RANK"] == "1" and action.micro_batch == 2:
        seen.append(action)
        if len(seen) == int(os.environ["STEP"]):
            time.sleep(1000) if os.environ["FAULT"] == "hang" else os.kill(os.getpid(), int(os.environ["FAULT"]))
    plain(self, action, x)
executor.Executor._forward = forward
sys.exit(pretrain(sys.argv[1:], program="pretrain_gpt.py", defaults={}))
"""
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 100 --lr 1e-3 --eval-iters 0 --log-interval 50 "
    "--pipeline-model-parallel-size 2 --tokenizer-type ByteTokenizer --split 100 --hang-timeout-seconds 6"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": "To be, or not to be: that is the question. " * 20}) for _ in range(20)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    tool = [os.environ["WARM_PYTHON"], "tools/preprocess_data.py", "--input", folder / "corpus.jsonl"]
    tool += ["--output-prefix", folder / "corpus"]
    subprocess.run([*tool, "--tokenizer-type", "ByteTokenizer", "--append-eod"], cwd=ROOT, check=True, capture_output=True)
    return folder / "corpus_text_document"


@pytest.mark.parametrize(("fault", "step"), [("9", "4"), ("19", "4"), ("hang", "1")])
def test_the_action_is_named(fault, step, data, tmp_path):
    """SIGKILL, SIGSTOP, and a stage that never comes back, also in the first step."""
    program = tmp_path / "run.py"
    program.write_text(PROGRAM)
    python = sys.executable if fault == "9" else os.environ["WARM_PYTHON"]  # a launcher of its own once
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    began = time.monotonic()
    done = subprocess.run(
        [*launch, program, ROOT, *FLAGS.split(), "--data-path", data],
        cwd=ROOT,
        env={**os.environ, "FAULT": fault, "STEP": step, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr[-3000:]
    assert f"rank 1 on host {os.uname().nodename}, stage 1, forward of micro-batch 2" in errors[0]
    assert time.monotonic() - began < 60
