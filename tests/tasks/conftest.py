"""A BERT that was pretrained on the toys' corpus, and each task's files, made once for all tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toys

from megatron.train.program import pretrain

ROOT = Path(__file__).parents[2]
SIZES = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
LENGTH = "--micro-batch-size 16 --train-iters 400 --lr 2e-3 --lr-warmup-iters 30 --mask-prob 0.2 --split 95,5,0"
REST = "--hidden-dropout 0 --attention-dropout 0 --log-interval 100 --eval-interval 1000 --eval-iters 0 --save-interval 400"
DEFAULTS = {"model.architecture": "bert", "tokenizer.tokenizer_type": "BertWordPieceLowerCase"}


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """checkpoint: of a BERT that fills in the toys' words. train, dev: for each task a file to learn from, one to judge by."""
    folder = tmp_path_factory.mktemp("toys")
    vocab, corpus = toys.vocabulary(folder), toys.corpus(folder, 2000)
    words = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(vocab)]
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus), "--split-sentences"]
    command = [*tool, "--output-prefix", str(folder / "c"), "--workers", "1", *words]
    subprocess.run(command, check=True, capture_output=True)
    data = ["--vocab-file", str(vocab), "--data-path", str(folder / "c_text_sentence"), "--save", str(folder / "bert")]
    flags = [*f"{SIZES} {LENGTH} {REST} --make-vocab-size-divisible-by 8".split(), *data]
    assert pretrain(flags, program="pretrain_bert.py", defaults=DEFAULTS) == 0
    made = {split: toys.files(folder / split, seed) for seed, split in enumerate(("train", "dev"))}
    return SimpleNamespace(folder=folder, checkpoint=str(folder / "bert"), **made)
