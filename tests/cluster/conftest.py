"""Shared by the tests on several hosts: a tiny run, and the lines of metrics that runs are compared by."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-warmup-iters 2 --split 80,20,0 --log-interval 1 --eval-iters 1"
)


def tool(name: str, *arguments: str | Path) -> None:
    command = [os.environ["WARM_PYTHON"], f"tools/{name}.py", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [json.dumps({"text": f"{i} green bottles, hanging on the wall. " * 20}) for i in range(40)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> list[str]:
    """Flags of a tiny GPT over bytes, without --save, --train-iters and intervals."""
    tokenizer = ["--tokenizer-type", "ByteTokenizer"]
    tool("preprocess_data", "--input", corpus, "--output-prefix", corpus.parent / "gpt", "--append-eod", *tokenizer)
    return [*FLAGS.split(), *tokenizer, "--data-path", f"{corpus.parent}/gpt_text_document"]


@pytest.fixture(scope="session")
def tiny_bert(corpus: Path) -> list[str]:
    """The same of a tiny BERT, with a vocabulary made for its text."""
    tokenizer = ["--tokenizer-type", "BertWordPieceLowerCase"]
    tool("train_tokenizer", "--input", corpus, "--output", corpus.parent, "--vocab-size", "64", *tokenizer)
    tokenizer += ["--vocab-file", str(corpus.parent / "vocab.txt")]
    tool("preprocess_data", "--input", corpus, "--output-prefix", corpus.parent / "bert", "--split-sentences", *tokenizer)
    return [*FLAGS.split(), *tokenizer, "--data-path", f"{corpus.parent}/bert_text_sentence"]


class MetricsLines:
    """Reads `metrics.jsonl`: what must be equal in two runs, and how far one is."""

    TIMES = frozenset({"iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "mfu_causal", "peak_memory_bytes"})

    def read(self, save: Path) -> list[dict[str, object]]:
        """All lines, without what a clock says."""
        text = (save / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in self.TIMES} for line in text]

    def iteration(self, save: Path) -> int:
        """The last iteration that was logged; 0 before the first."""
        path = save / "metrics.jsonl"
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
        return int(json.loads(whole[-1])["iteration"]) if whole else 0


@pytest.fixture(scope="session")
def lines() -> MetricsLines:
    return MetricsLines()


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """Starts an uninterrupted run of two ranks on this host: program, flags -> (process, its directory)."""

    def start(program: str, *flags: str) -> tuple[subprocess.Popen[bytes], Path]:
        save = tmp_path_factory.mktemp("alone")
        launch = [os.environ["WARM_PYTHON"], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launch, program, *flags, "--save", str(save)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet), save

    return start
