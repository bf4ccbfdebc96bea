"""Runs over made-up data need no file, resume exactly, and say what they are; also with iterations that are left out."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from megatron.cli.program import pretrain
from megatron.config.schema import BatchSettings, EvalConfig
from megatron.train.ending import Exit
from megatron.train.hooks.evaluate import Evaluate, HeldOut
from megatron.train.loop import Training
from megatron.train.state import TrainState

TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 4 --global-batch-size 8 --train-iters 8 --lr 3e-3 --log-interval 1 --eval-interval 0 --eval-iters 1 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 300 --split 80,10,10"
)
FLAGS = TINY.split()
MOCK_DATA_NOTE = "the data are synthetic, as --mock-data asks, so the losses say nothing about a corpus"


def run(*flags, model: str = "gpt") -> int:
    defaults = {"model.architecture": "bert"} if model == "bert" else {}
    return pretrain([*FLAGS, *map(str, flags)], program=f"pretrain_{model}.py", defaults=defaults)


def run_and_fail(capsys, *flags) -> str:
    try:
        status = run(*flags)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return capsys.readouterr().err


def metrics(folder) -> list[dict]:
    times = ("iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_a_run_without_a_file_resumes_exactly(model, tmp_path, capsys):
    whole, split = tmp_path / "whole", tmp_path / "split"
    left_out = ["--iterations-to-skip", 2, 5, "--save-interval", 100]
    assert run("--save", whole, *left_out, model=model) == Exit.FINISHED
    out = capsys.readouterr().out
    assert out.count(MOCK_DATA_NOTE) == 1
    assert run("--save", split, *left_out, "--auto-resume", "--exit-interval", 3, model=model) == Exit.STOPPED
    assert run("--save", split, *left_out, "--auto-resume", model=model) == Exit.FINISHED
    assert metrics(split) == metrics(whole)
    final, expected = (load_file(f / "iter_0000008" / "shard_00000.safetensors") for f in (split, whole))
    assert final.keys() == expected.keys() and all(torch.equal(final[name], expected[name]) for name in final)
    lines = [line for line in metrics(whole) if "split" not in line]
    assert [line["iteration"] for line in lines if line["lm_loss"] is None] == [2, 5]
    assert [line["consumed_samples"] for line in lines] == [8 * n for n in range(1, 9)]
    evaluations = [(line["iteration"], line["split"]) for line in metrics(whole) if "split" in line]
    assert evaluations == [(8, "validation"), (8, "test")]  # none but those at the end
    skipped = [int(n) for n in re.findall(r"consumed samples: +\d+ \| skipped samples: +(\d+) \|", capsys.readouterr().out)]
    assert skipped == [8, 8, 8, 16, 16, 16, 16]


def test_a_step_that_is_left_out_counts_in_no_time_and_no_throughput(tmp_path):
    assert run("--save", tmp_path, "--save-interval", 100, "--iterations-to-skip", 2, "3-6", "--log-interval", 2) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, *idle, last = [line for line in lines if "split" not in line]
    assert [line["skipped_iterations"] for line in (first, *idle, last)] == [1, 2, 2, 0]
    timed = ("iteration_time_ms", "tokens_per_second", "tflops_per_gpu")
    assert all(line[key] is None for line in idle for key in timed)
    for line, steps in ((first, 1), (last, 2)):
        seconds = line["iteration_time_ms"] * steps / 1000
        assert line["tokens_per_second"] == pytest.approx(steps * 8 * 32 / seconds)
    assert first["tflops_per_gpu"] / first["tokens_per_second"] == pytest.approx(
        last["tflops_per_gpu"] / last["tokens_per_second"]
    )


def test_without_an_interval_an_evaluation_that_was_given_up_is_not_made():
    state = TrainState(iteration=3, evaluation_due=True)
    config = SimpleNamespace(eval=EvalConfig(eval_interval=0), batch=BatchSettings(train_iters=9))
    training = Training(SimpleNamespace(state=state, config=config), None, [], None, start=3)
    Evaluate(HeldOut("validation", lambda: pytest.fail("it was made"))).before_training(training)
    assert training.request.stop is None and not state.evaluation_due


def test_what_a_model_can_learn_it_learns(tmp_path):
    quick = ["--train-iters", 60, "--lr", "2e-2", "--micro-batch-size", 8, "--hidden-dropout", 0, "--attention-dropout", 0]
    assert run(*quick, "--metrics-path", tmp_path / "m", "--log-interval", 20) == 0
    *training, validation, _ = (json.loads(line) for line in (tmp_path / "m").read_text().splitlines())
    assert training[0]["lm_loss"] > 4 and training[-1]["lm_loss"] < 2.5
    assert validation["lm_loss"] == pytest.approx(training[-1]["lm_loss"], abs=0.4)


def test_the_data_of_a_resumed_run_stay_what_they_were(tmp_path, capsys):
    saved = ["--save", tmp_path, "--save-interval", 100, "--train-iters", 2]
    assert run(*saved) == 0
    for ending in (".bin", ".idx"):
        (tmp_path / f"corpus{ending}").write_bytes(b"x")
    more = [*map(str, [*saved, "--train-iters", 4, "--auto-resume", "--override-opt_param-scheduler"])]
    real = [flag for flag in FLAGS if flag != "--mock-data"]
    assert pretrain([*real, *more, "--data-path", str(tmp_path / "corpus")], program="p", defaults={}) == 2
    assert "corpus` changes the training data of" in (error := capsys.readouterr().err)
    assert "which was trained on `--mock-data`; legal: --mock-data;" in error and error.count("error: ") == 1
    assert run(*more) == 0
    assert "`--mock-data` and `--data-path x` exclude each other" in run_and_fail(capsys, "--data-path", "x")


def test_a_dry_run_says_that_the_data_are_made_up(capsys):
    wide = ["--dry-run", "--world-size", 4, "--tensor-model-parallel-size", 2]
    assert run(*wide) == 0
    out = capsys.readouterr().out
    assert MOCK_DATA_NOTE in out and "mock-data = true" in out and "a run also needs" not in out
