"""A small corpus, preprocessed once: pages of a manual in bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from texts import pages

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "pages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in pages(64, 1600)))
    command = [os.environ["WARM_PYTHON"]]
    command += [ROOT / "tools" / "preprocess_data.py", "--input", folder / "pages.jsonl", "--append-eod"]
    command += ["--output-prefix", folder / "pages", "--tokenizer-type", "ByteTokenizer", "--workers", "1"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder / "pages_text_document"


@pytest.fixture
def flags(corpus, tmp_path):
    """A tiny GPT run: a dozen steps in seconds."""
    text = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
        "--micro-batch-size 2 --global-batch-size 4 --train-iters 12 --lr 1e-2 --lr-warmup-iters 2 "
        "--tokenizer-type ByteTokenizer --split 80,10,10 --log-interval 1 --eval-interval 5 --eval-iters 2 --save-interval 4"
    )
    return [*text.split(), "--data-path", str(corpus), "--save", str(tmp_path / "run")]


@dataclass
class Ended:
    """The end of a slice of a run.

    Attributes:
        statuses: exit statuses by rank.
        seconds: until the last rank's end.
        out: the standard output of all ranks.
        err: their standard error.
        left: each rank's message, where torchrun looks for it.
    """

    statuses: list[int]
    seconds: float
    out: str
    err: str
    left: list[str]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Slices:
    """Runs commands on forked ranks, see `slices.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "slices.py"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, argv, *, ranks=2, fault=None, launcher=True, env=None) -> Ended:
        """Run a command on forked ranks.

        Args:
            argv: its flags.
            ranks: number of ranks.
            fault: (rank, phase, at, how), see `slices.py`; None for none.
            launcher: end all ranks when one has failed, as torchrun does.
            env: further variables.
        """
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        named = None if fault is None else dict(zip(("rank", "phase", "at", "how"), fault, strict=True))
        job = {"argv": [*map(str, argv)], "ranks": ranks, "fault": named, "launcher": launcher, "env": env or {}}
        self.process.stdin.write(json.dumps(job | {"out": str(out), "err": str(err)}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        files = [Path(f"{err}.{rank}.json") for rank in range(ranks)]
        left = [json.loads(file.read_text())["message"]["message"] if file.exists() else "" for file in files]
        return Ended(answer["statuses"], answer["seconds"], out.read_text(), err.read_text(), left)


@pytest.fixture(scope="session")
def slices(tmp_path_factory):
    started = Slices(tmp_path_factory.mktemp("slices"))
    yield started
    started.process.stdin.close()
    started.process.wait(30)
