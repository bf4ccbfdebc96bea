"""What the tests on several hosts share: a tiny run, and the lines of metrics that runs are compared by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-warmup-iters 2 --tokenizer-type ByteTokenizer "
    "--split 80,20,0 --log-interval 1 --eval-iters 1"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a tiny GPT over bytes, without --save, --train-iters and intervals."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"{i} green bottles, hanging on the wall. " * 20}) for i in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    tool = [sys.executable, "tools/preprocess_data.py", "--input", folder / "corpus.jsonl", "--append-eod"]
    tool += ["--output-prefix", folder / "corpus", "--tokenizer-type", "ByteTokenizer"]
    subprocess.run(list(map(str, tool)), cwd=ROOT, check=True, capture_output=True)
    return [*FLAGS.split(), "--data-path", str(folder / "corpus_text_document")]


class Lines:
    """Reads `metrics.jsonl`: what must be equal in two runs, and how far one is."""

    TIMES = frozenset({"iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "peak_memory_bytes"})

    def of(self, save: Path) -> list[dict[str, object]]:
        """All lines, without what a clock says."""
        text = (save / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in self.TIMES} for line in text]

    def iteration(self, save: Path) -> int:
        """The last iteration that was logged; 0 before the first."""
        path = save / "metrics.jsonl"
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
        return int(json.loads(whole[-1])["iteration"]) if whole else 0


@pytest.fixture(scope="session")
def lines() -> Lines:
    return Lines()


@pytest.fixture(scope="session")
def alone(tiny: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Starts an uninterrupted run of two ranks on this host: flags -> (process, its directory)."""

    def start(*flags: str) -> tuple[subprocess.Popen[bytes], Path]:
        save = tmp_path_factory.mktemp("alone")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launch, "pretrain_gpt.py", *tiny, *flags, "--save", str(save)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet), save

    return start
