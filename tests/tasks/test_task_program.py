"""tasks/main.py as it is typed: zero-shot scores on four ranks, wrong commands, the scripts of examples/megatron_lm."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
from ranks import on_ranks
from trained_gpt import Reference, sentences, train_and_export

from megatron.cli.program import run_task

ROOT = Path(__file__).parents[2]
TP_PP = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")


def task(*flags: object) -> int:
    return run_task([*map(str, flags)], program="tasks/main.py", defaults={"batch.micro_batch_size": 8})


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("gpt"), steps=40)


def test_zero_shot_scores_on_four_ranks_are_those_of_transformers(gpt, tmp_path):
    reference = Reference(gpt)
    text, lines = ". ".join(sentences(5, 3)), sentences(8, 9)
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    asked = ["--load", gpt / "run", "--results-path", tmp_path / "r.json", *TP_PP]

    window = ["--task", "WIKITEXT103", "--valid-data", tmp_path / "text.txt", "--seq-length", 24, "--overlapping-eval", 10]
    assert on_ranks(4, task, *asked, *window) == [0] * 4
    found = json.loads((tmp_path / "r.json").read_text())
    tokens = reference.tokens(text)
    expected = -sum(reference.all_after_first(tokens, 24, 10)) / (len(tokens) - 1)
    ratio = (len(tokens) - 1) / (len(text.split(" ")) - 1)
    assert found["loss"] == pytest.approx(expected, abs=1e-4)
    assert found["adjusted_ppl"] == pytest.approx(math.exp(expected * ratio), rel=1e-3)

    assert on_ranks(4, task, *asked, "--task", "LAMBADA", "--valid-data", tmp_path / "lambada.jsonl") == [0] * 4
    found, hits = json.loads((tmp_path / "r.json").read_text()), 0
    for line in lines:
        *context, last = reference.tokens(line)
        hits += reference.log_prob(context, last)[1]
    assert found["correct"] == hits and found["accuracy"] == pytest.approx(hits / 8, abs=1e-4)


def test_wrong_commands_are_answered_in_words(gpt, bert, tmp_path, capsys):
    def said(*flags: object) -> str:
        assert task(*flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    dev = bert.dev["MNLI"]
    assert "holds a BERT" in said("--task", "WIKITEXT103", "--load", bert.checkpoint, "--valid-data", dev)
    (tmp_path / "l.jsonl").write_text('{"text": "ma lo ma"}\n')
    ask = ["--task", "LAMBADA", "--load", gpt / "run", "--valid-data", tmp_path / "l.jsonl"]
    assert "`--num-layers 2` does not fit" in said(*ask, "--num-layers", 2)
    (tmp_path / "empty").write_text("")
    assert "there is no text in it" in said("--task", "LAMBADA", "--load", gpt / "run", "--valid-data", tmp_path / "empty")
    train = ["--task", "MNLI", "--pretrained-checkpoint", bert.checkpoint, "--epochs", 1, "--lr", "1e-3"]
    assert "names no column" in said(*train, "--train-data", bert.train["NER"])
    assert "fewer than one global batch of 512" in said(*train, "--train-data", dev, "--global-batch-size", 512)
    late = ["--train-data", dev, "--lr-warmup-iters", 12]
    assert "`--lr-warmup-iters 12` is not less than `--lr-decay-iters 12`" in said(*train, *late)
    assert "does not fit" in said(*train, "--train-data", dev, "--num-layers", 3)
    with pytest.raises(SystemExit) as ended:
        task("--task", "MNLI", "--load", tmp_path / "nowhere", "--valid-data", dev)
    assert ended.value.code == 2 and capsys.readouterr().err.count("error: ") == 1


def test_a_dry_run_reads_what_a_run_would(gpt, bert, tmp_path, capsys):
    """Checkpoint, tokenizer and samples; and what it prints is a file for --config."""
    train = ["--task", "RACE", "--pretrained-checkpoint", bert.checkpoint, "--train-data", bert.train["RACE"], "--epochs", 2]
    assert task(*train, "--lr", "1e-3", "--dry-run") == 0
    said = capsys.readouterr().out
    assert (
        "512 samples to train on, 128 iterations of 8" in said
        and f"128 iterations, 1,024 samples, {4 * 1024 * 32:,} tok" in said
    )
    whole, token = (float(word) for word in re.search(r"(\S+) FLOPs per iteration.*, (\S+) per token", said).groups())
    assert whole == pytest.approx(8 * 4 * 32 * token, rel=1e-3)
    (tmp_path / "run.toml").write_text(said.partition("# 1 ranks")[0])
    assert task("--config", tmp_path / "run.toml", "--dry-run") == 0
    assert capsys.readouterr().out == said
    (tmp_path / "l.jsonl").write_text('{"text": "ma lo ma"}\n')
    ask = ["--task", "LAMBADA", "--valid-data", tmp_path / "l.jsonl", "--dry-run"]
    assert task(*ask, "--load", gpt / "run") == 0 and "vocabulary: 257" in capsys.readouterr().out
    for wrong, why in (
        (["--load", bert.checkpoint], "holds a BERT"),
        (["--load", gpt / "run", "--valid-data", bert.vocab], "not JSON"),
    ):
        with pytest.raises(SystemExit) as ended:
            task(*ask, *wrong)
        assert ended.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mnli", "race"])
def test_the_scripts_that_fine_tune(name, bert, tmp_path):
    """In small, on two ranks, from the folders that the real data come in."""
    folder = tmp_path / "data"
    folder.mkdir()
    made = bert.dev
    for split in ("train", "dev"):
        if name == "mnli":
            for file in ("train.tsv",) if split == "train" else ("dev_matched.tsv", "dev_mismatched.tsv"):
                (folder / file).symlink_to(made["MNLI"])
        else:
            for kind in ("middle", "high"):
                (folder / split).mkdir(exist_ok=True)
                (folder / split / kind).symlink_to(made["RACE"])
    small = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --epochs 1"
    command = [str(ROOT / "examples" / "megatron_lm" / f"finetune_{name}_distributed.sh"), str(folder), bert.vocab]
    command += [bert.checkpoint, str(tmp_path / "save"), *small.split(), "--initial-loss-scale", "1024"]
    environment = {**os.environ, "GPUS": "2", "PYTHON": os.environ["WARM_PYTHON"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "save" / "results.json").read_text())
    assert len(found["files"]) == 2 and found["total"] == 2 * 96


def test_the_script_that_asks(gpt, tmp_path):
    """Its tokenizer is GPT-2's by its flags; here the checkpoint's own is bytes."""
    (tmp_path / "l.jsonl").write_text('{"text": "ma lo ma"}\n')
    command = [str(ROOT / "examples" / "megatron_lm" / "evaluate_zeroshot_gpt.sh"), str(tmp_path / "l.jsonl"), "v", "m"]
    small = "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --seq-length 40 --max-position-embeddings 40"
    command += [str(gpt / "run"), *small.split(), "--tokenizer-type", "ByteTokenizer"]
    environment = {**os.environ, "GPUS": "1", "PYTHON": os.environ["WARM_PYTHON"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and " validation results on LAMBADA | " in done.stdout, done.stdout + done.stderr


def test_a_dry_run_says_what_a_task_would_take(gpt, bert, tmp_path, capsys):
    race = ["--task", "RACE", "--pretrained-checkpoint", bert.checkpoint, "--train-data", bert.train["RACE"], "--epochs", 1]
    more = ["--lr", "1e-3", "--dry-run", "--world-size", 8, "--tensor-model-parallel-size", 2]
    assert task(*race, *more) == 0
    said = capsys.readouterr().out
    assert "108,801 in all" in said and "tensor 2 x pipeline 1 x context 1 x data 4" in said and "# Memory" in said
    with pytest.raises(SystemExit):
        task("--task", "LAMBADA", "--load", gpt / "run", "--valid-data", gpt, "--dry-run")
    (tmp_path / "l.jsonl").write_text('{"text": "ma lo"}')
    assert task("--task", "LAMBADA", "--load", gpt / "run", "--valid-data", tmp_path / "l.jsonl", "--dry-run") == 0
    assert "# Parameters" in (said := capsys.readouterr().out) and "# Memory" not in said  # nothing is trained
