"""A small real corpus, preprocessed once: Python's own language reference in bytes."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "topics.jsonl").open("w") as out:
        for _, text in sorted(pydoc_data.topics.topics.items()):
            out.write(json.dumps({"text": text[:2000]}) + "\n")
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", folder / "topics.jsonl", "--append-eod"]
    command += ["--output-prefix", folder / "topics", "--tokenizer-type", "ByteTokenizer", "--workers", "1"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder / "topics_text_document"


@pytest.fixture
def flags(corpus, tmp_path):
    """A tiny GPT run: a dozen steps in seconds."""
    text = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
        "--micro-batch-size 2 --global-batch-size 4 --train-iters 12 --lr 1e-2 --lr-warmup-iters 2 "
        "--tokenizer-type ByteTokenizer --split 80,10,10 --log-interval 1 --eval-interval 5 --eval-iters 2 --save-interval 4"
    )
    return [*text.split(), "--data-path", str(corpus), "--save", str(tmp_path / "run")]
