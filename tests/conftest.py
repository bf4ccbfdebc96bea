"""Makes the helpers of this folder importable, keeps each process to one thread, and makes what several folders' tests need."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as every program sets it, before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as the tools that run in here set it, which would make their forks differ
sys.path.insert(0, str(Path(__file__).parent))
# A shell starts what runs in its background deaf to interrupts, and so would be what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Start what forks the tests' processes, once for all workers, which have its name in their environment."""
    if not hasattr(config, "workerinput"):
        from warm_start import WarmServers

        config.add_cleanup(WarmServers().end)


# Files that take long begin first, the longest before the others, so that at the end no process is left alone with one of them.
SLOW = (
    "test_two_hosts", "test_pipeline", "test_layout_matrix", "test_distributed_optimizer", "test_documents", "test_failures",
    "test_benchmark", "test_crash", "test_bad_input", "test_context", "test_training", "test_task_program", "test_finetune",
    "test_chaos_short", "test_bert", "test_real_failures", "test_stopping", "test_hf_sweep", "test_megatron_lm_scripts",
    "test_examples", "test_linear_time", "test_toy_hooks", "test_toy_optimizer", "test_toy_family", "test_hf", "test_saver",
    "test_fuzz_checkpoint",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files by SLOW; those that it does not name, and the tests of a file, stay in their order."""
    place = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOW)))


def pytest_collection_finish() -> None:
    """Let what thousands of tests are made of be no matter of the garbage collections to come, here and in forks."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals_are_given_back() -> Iterator[None]:
    """Fail the test that leaves signals to a pipe, not a later one, whose program could not take them and would end pytest."""
    yield
    assert signal.set_wakeup_fd(-1) == -1, "signals are still written to a pipe"


BERT = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
LENGTH = "--micro-batch-size 16 --train-iters 400 --lr 2e-3 --lr-warmup-iters 30 --mask-prob 0.2 --split 95,5,0"
REST = "--hidden-dropout 0 --attention-dropout 0 --log-interval 100 --eval-interval 1000 --eval-iters 0 --save-interval 400"


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Train a BERT that fills in the words of a toy world (toys.py), once for all workers.

    Returns:
        checkpoint, vocab: its directory, its vocab.txt. train, dev: for each task a file to train on, one to evaluate on.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "toys"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made.json").exists():
            (folder / "made.json").write_text(json.dumps(train_toy(folder)))
        made = json.loads((folder / "made.json").read_text())
    return SimpleNamespace(folder=folder, checkpoint=str(folder / "bert"), **made)


def train_toy(folder: Path) -> dict[str, Any]:
    """Train the BERT of the toy world into `folder`/bert; return its vocabulary's path and the tasks' files of each split."""
    import toys

    from megatron.cli.program import pretrain

    vocab, corpus = toys.write_vocabulary(folder), toys.write_corpus(folder, 2000)
    tool = [os.environ["WARM_PYTHON"], str(Path(__file__).parents[1] / "tools" / "preprocess_data.py"), "--input", str(corpus)]
    words = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(vocab), "--split-sentences", "--workers", "1"]
    subprocess.run([*tool, "--output-prefix", str(folder / "c"), *words], check=True, capture_output=True)
    data = ["--vocab-file", str(vocab), "--data-path", str(folder / "c_text_sentence"), "--save", str(folder / "bert")]
    flags = [*f"{BERT} {LENGTH} {REST} --make-vocab-size-divisible-by 8".split(), *data]
    defaults = {"model.architecture": "bert", "tokenizer.tokenizer_type": "BertWordPieceLowerCase"}
    assert pretrain(flags, program="pretrain_bert.py", defaults=defaults) == 0
    return {
        "vocab": str(vocab),
        **{split: toys.write_task_files(folder / split, seed) for seed, split in enumerate(("train", "dev"))},
    }
