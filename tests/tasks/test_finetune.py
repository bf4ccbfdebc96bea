"""Fine-tuning: the four heads learn their tasks on every layout, as one process does, and open in Transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import on_ranks

from megatron.cli.program import run_task
from megatron.config.resolve import resolve
from megatron.config.schema import BatchSettings, DataSettings, ModelSettings, RunSettings
from megatron.inference.pipeline import Pipeline
from megatron.interop.checked_export import export_hf
from megatron.tasks.tagging import entities, read_sentences
from megatron.train.report import sample_flops

DEFAULTS = {"batch.micro_batch_size": 8}
DRY = ("--hidden-dropout", "0", "--attention-dropout", "0")
EPOCHS = {"MNLI": 4, "RACE": 6, "SQUAD": 4, "NER": 2}
LAYOUTS = {
    "tp 2": (2, "--tensor-model-parallel-size 2"),
    "tp 2, sequence": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp 2": (2, "--pipeline-model-parallel-size 2"),
    "dp 2": (2, ""),
    "dp 2, sharded": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
}


def task(*flags: object) -> int:
    return run_task([*map(str, flags)], program="tasks/main.py", defaults=DEFAULTS)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("lm_loss", "grad_norm") if line.get(key) is not None]


def fine_tuning(bert, name: str, save: Path, *more: object) -> list[object]:
    data = ["--task", name, "--pretrained-checkpoint", bert.checkpoint, "--train-data", bert.train[name]]
    return [*data, "--valid-data", bert.dev[name], "--save", save, "--log-interval", "1", *more]


@pytest.mark.parametrize("name", EPOCHS)
@pytest.mark.parametrize("layout", ["tp 2", "pp 2"])
def test_a_pretrained_model_learns_the_task(name, layout, bert, tmp_path):
    world, flags = LAYOUTS[layout]
    length = ["--epochs", EPOCHS[name], "--lr", "2e-3", "--lr-warmup-fraction", "0.1", *DRY]
    assert on_ranks(world, task, *fine_tuning(bert, name, tmp_path, *length, *flags.split())) == [0] * world
    found = results(tmp_path)
    assert all(found[metric] > 95.0 for metric in ("accuracy", "exact_match", "f1") if metric in found), found
    answers = found["files"][0]["answers"]
    assert len(answers) == 96 and found["task"] == name


@pytest.fixture(scope="module")
def alone(bert, tmp_path_factory):
    """Losses, gradient norms and results of a few steps in one process, with dropout, by the task."""
    found = {}

    def run_once(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("alone")
            assert task(*fine_tuning(bert, name, folder, *SHORT)) == 0
            found[name] = folder
        return found[name]

    return run_once


SHORT = ("--epochs", "1", "--global-batch-size", "64", "--micro-batch-size", "4", "--lr", "1e-3", "--save-interval", "3")


# All layouts for one head; for each other one a layout with sequence parallelism, and one with stages or slices.
FEW = {"RACE": ("tp 2, sequence", "pp 2"), "SQUAD": ("tp 2, sequence", "dp 2, sharded"), "NER": ("tp 2, sequence", "pp 2")}
PAIRS = [*(("MNLI", layout) for layout in LAYOUTS), *((name, layout) for name, few in FEW.items() for layout in few)]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_every_layout_is_one_process(name, layout, bert, alone, tmp_path):
    world, flags = LAYOUTS[layout]
    assert on_ranks(world, task, *fine_tuning(bert, name, tmp_path, *SHORT, *flags.split())) == [0] * world
    expected = losses(alone(name))
    # Later steps of a choice, whose gradients are differences of rows that are nearly equal, enlarge what rounding began.
    assert losses(tmp_path)[:4] == pytest.approx(expected[:4], rel=1e-5, abs=1e-6)
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-3 if name == "RACE" else 1e-4) and len(expected) >= 8
    assert results(tmp_path)["files"] == results(alone(name))["files"]


@pytest.mark.parametrize("name", EPOCHS)
def test_a_fine_tuned_model_opens_in_transformers(name, alone, tmp_path):
    """The export compares the logits of both before it says done."""
    export_hf(alone(name), tmp_path / "hf", say=lambda line: None)
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    kinds = {
        "MNLI": "SequenceClassification",
        "RACE": "MultipleChoice",
        "SQUAD": "QuestionAnswering",
        "NER": "TokenClassification",
    }
    assert about["architectures"] == [f"MegatronBertFor{kinds[name]}"]


def test_an_interrupted_run_goes_on(bert, alone, tmp_path):
    whole, flags = losses(alone("MNLI")), fine_tuning(bert, "MNLI", tmp_path, *SHORT)
    assert task(*flags, "--exit-interval", "3") == 75
    assert len(losses(tmp_path)) < len(whole)
    assert task(*flags, "--auto-resume") == 0
    assert losses(tmp_path) == whole


def test_losses_are_validated_as_often_as_asked_and_answers_after_each_epoch(bert, tmp_path, capsys):
    """As Megatron-LM's scripts ask: --eval-interval and --eval-iters are of the loss, whose first samples are not all."""
    often = ["--eval-interval", 3, "--eval-iters", 1, "--epochs", 2, "--global-batch-size", 64, "--lr", "1e-3"]
    assert task(*fine_tuning(bert, "MNLI", tmp_path, *often)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "validation loss at" in line or ">> |epoch" in line]
    assert [line.split("|")[1].strip() if "epoch" in line else line.split()[4] for line in said] == [
        "3",
        "epoch: 1",
        "6",
        "epoch: 2",
    ]


@pytest.mark.parametrize("name", ["NER", "SQUAD"])
def test_several_files_are_scored_as_one(name, bert, alone, tmp_path):
    """Entities of all files together make F1; and a question counts in each file that has it."""
    asked = ["--task", name, "--load", alone(name), "--results-path", tmp_path / "r.json"]
    assert task(*asked, "--valid-data", bert.dev[name], bert.train[name], bert.dev[name]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    counted = "entities" if name == "NER" else "total"
    assert found[counted] == sum(file[counted] for file in found["files"])
    if name == "SQUAD":
        assert found["total"] == 96 + 256 + 96
        return
    hits = said = 0
    for file, path in zip(found["files"], (bert.dev[name], bert.train[name], bert.dev[name]), strict=True):
        for words, answer in zip(read_sentences(path), file["answers"], strict=True):
            true, given = set(entities([tag for _, tag in words])), set(entities(answer["answer"]))
            hits, said = hits + len(true & given), said + len(given)
    assert found["f1"] == pytest.approx(200 * hits / (said + found["entities"]))


def test_answers_that_are_no_numbers_are_an_error(bert, alone, tmp_path, monkeypatch, capfd):
    real = Pipeline.task_logits
    monkeypatch.setattr(Pipeline, "task_logits", lambda self, batch: real(self, batch) * float("nan"))
    asked = ["--task", "MNLI", "--load", alone("MNLI"), "--valid-data", bert.dev["MNLI"]]
    assert task(*asked, "--results-path", tmp_path / "r.json") == 1 and not (tmp_path / "r.json").exists()
    assert "the model's output for 0x is NaN" in capfd.readouterr().err


def test_a_choice_computes_a_row_for_each_answer():
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 8}
    kinds = [{"task_head": "classification", "labels": ("a",)}, {"task_head": "choice", "labels": tuple("ABCD")}]
    rest = {"data": DataSettings(seq_length=8), "batch": BatchSettings(micro_batch_size=1)}
    runs = [RunSettings(model=ModelSettings(architecture="bert", **sizes, **kind), **rest) for kind in kinds]
    one, four = (sample_flops(resolve(run)) for run in runs)
    assert four == 4 * one > 0


def test_a_fine_tuned_model_is_only_evaluated(bert, alone, tmp_path, capsys):
    """Also on another layout; and by another program, or for another task, not at all."""
    for layout in ("tp 2", "pp 2", "dp 2"):
        world, flags = LAYOUTS[layout]
        asked = ["--task", "MNLI", "--load", alone("MNLI"), "--valid-data", bert.dev["MNLI"], bert.train["MNLI"]]
        where = tmp_path / f"{layout}.json"
        assert on_ranks(world, task, *asked, "--results-path", where, *flags.split()) == [0] * world
        found = json.loads(where.read_text())
        assert found["files"][0]["answers"] == results(alone("MNLI"))["files"][0]["answers"]
        assert found["total"] == 96 + 256 and found["correct"] == sum(f["correct"] for f in found["files"])
    capsys.readouterr()
    assert task("--task", "NER", "--load", alone("MNLI"), "--valid-data", bert.dev["NER"]) == 2
    assert "a model for tags" in (said := capsys.readouterr().err) and "was fine-tuned for classification" in said
    assert task("--task", "MNLI", "--load", bert.checkpoint, "--valid-data", bert.dev["MNLI"]) == 2
    assert "were pretrained and not fine-tuned" in capsys.readouterr().err
