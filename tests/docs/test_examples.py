"""Examples are true: their files are legal for this program, and the small ones run."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import PYTHON, ROOT, run

EXAMPLES = ROOT / "examples"
RECIPES = sorted(p.parent.name for p in EXAMPLES.glob("*/run.toml") if "bert" not in p.parent.name)  # BERT's is run below


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a small dataset of bytes."""
    folder = tmp_path_factory.mktemp("data")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{i} green bottles. " * 40}) + "\n" for i in range(60)), encoding="utf-8")
    flags = ["--tokenizer-type", "ByteTokenizer", "--append-eod"]
    done = run(PYTHON, "tools/preprocess_data.py", "--input", corpus, "--output-prefix", folder / "corpus", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "corpus_text_document"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_legal(name: str, data: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer-type", "ByteTokenizer", "--data-path", data, "--save", tmp_path / "save"]
    recipe = EXAMPLES / name / "run.toml"
    done = run(
        PYTHON,
        "pretrain_gpt.py",
        "--config",
        recipe,
        *flags,
        "--dry-run",
        "--world-size",
        "8" if "gpt2" in name or "1.2b" in name else "1",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_recipe_is_noticed(data: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "run.toml"
    wrong.write_text((EXAMPLES / "gpt2_125m" / "run.toml").read_text(encoding="utf-8").replace("train-iters", "train-iterz"))
    flags = ["--tokenizer-type", "ByteTokenizer", "--data-path", data, "--dry-run", "--world-size", "8"]
    done = run(PYTHON, "pretrain_gpt.py", "--config", wrong, *flags)
    assert done.returncode == 2
    assert "train-iterz" in done.stderr


def losses(metrics: Path) -> list[float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [r["lm_loss"] for r in records if r.get("lm_loss") is not None]


def test_four_ranks_lose_what_one_loses(tmp_path: Path) -> None:
    """The scripts of both tiny examples, cut to six steps: training and validation losses are equal, dropout and all."""
    short = ["--train-iters", "6", "--log-interval", "2", "--eval-interval", "3", "--eval-iters", "2", "--save-interval", "6"]
    found = {}
    for name in ("gpt_tiny_cpu", "gpt_tiny_4_ranks_cpu"):
        done = run(EXAMPLES / name / "run.sh", tmp_path / name, *short)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "def " in done.stdout
        found[name] = losses(tmp_path / name / "checkpoints" / "metrics.jsonl")
    one, four = found.values()
    assert len(one) > 4
    assert four == pytest.approx(one, rel=1e-5)
    assert len(set(one)) == len(one)


def test_tiny_bert_runs(tmp_path: Path) -> None:
    """Cut to six steps, from Python's own text to the loss without context, beside which the run's is to be read."""
    short = ["--train-iters", "6", "--lr-decay-iters", "6", "--log-interval", "2", "--eval-iters", "2", "--save-interval", "6"]
    done = run(EXAMPLES / "bert_tiny_cpu" / "run.sh", tmp_path, *short)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(losses(tmp_path / "checkpoints" / "metrics.jsonl")) == 4
    assert (tmp_path / "loss.svg").exists()
    found = re.search(r"([\d.]+) from each token's share in training, ([\d.]+) from its share among them\n", done.stdout)
    assert found is not None, done.stdout[-1000:]
    known, own = map(float, found.groups())
    assert 4.0 < own < known < math.log(1002), "it knows more than nothing, and no other shares are better than their own"


def test_the_loss_without_context() -> None:
    module = runpy.run_path(str(EXAMPLES / "bert_tiny_cpu" / "unigram.py"))
    counts, shares = np.array([2, 6, 0]), np.array([0.25, 0.5, 0.25])
    assert module["cross_entropy"](counts, shares) == pytest.approx((2 * math.log(4) + 6 * math.log(2)) / 8)
    sample = SimpleNamespace(labels=np.array([3, 1, 3, 0]), loss_mask=np.array([True, False, True, True]))
    assert module["masked_counts"]([sample, sample, sample], 2, 4).tolist() == [2, 0, 0, 4]


def test_tiny_shakespeare_runs_on_any_text(tmp_path: Path) -> None:
    text = tmp_path / "input.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 400, encoding="utf-8")
    short = ["--train-iters", "30", "--lr-decay-iters", "30", "--lr-warmup-iters", "5", "--log-interval", "5"]
    done = run(EXAMPLES / "tiny_shakespeare_char" / "run.sh", text, tmp_path / "out", *short, "--eval-iters", "2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = losses(tmp_path / "out" / "checkpoints" / "metrics.jsonl")
    assert found[-1] < found[0]
    missing = run(EXAMPLES / "tiny_shakespeare_char" / "run.sh", tmp_path / "absent.txt", tmp_path / "out2")
    assert missing.returncode != 0


def test_the_character_tokenizer_gives_the_text_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = "First Citizen:\n  Speak,\tspeak — œ!\n" * 20
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    done = run(PYTHON, EXAMPLES / "tiny_shakespeare_char" / "prepare.py", tmp_path / "input.txt", tmp_path)
    assert done.returncode == 0, done.stderr
    parts = [json.loads((tmp_path / f"{part}.jsonl").read_text(encoding="utf-8"))["text"] for part in ("train", "valid")]
    assert "".join(parts) == text
    assert len(parts[0]) == int(0.9 * len(text))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text)
    assert sorted(set(ids)) == list(range(len(set(text))))
    assert tokenizer.decode(ids) == text
