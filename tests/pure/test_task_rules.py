"""The command line of tasks/main.py: what follows from a task, and what is said of a wrong command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.config.command_line.parse import Parsed, parse
from megatron.config.command_line.saved import to_json
from megatron.config.errors import ConfigError
from megatron.config.rules import EVERY_RUN, TASK_RULES, resolved_check
from megatron.config.schema import ModelSettings, RunSettings
from megatron.config.task import TASKS, task_files

MODEL = ModelSettings(num_layers=2, hidden_size=16, num_attention_heads=4, max_position_embeddings=64, vocab_size=99)
# A legal command of each kind; `:` stands for what takes part of it away.
TRAIN = "--task MNLI --pretrained-checkpoint ck --train-data a --valid-data b --epochs 2 --lr 1e-3"
ASK = "--task WIKITEXT103 --load ck --valid-data b"


def parse_task(text: str, world: int = 1, check_disk: bool = False) -> Parsed:
    saved = lambda checkpoint: to_json(RunSettings(model=MODEL))  # noqa: E731
    defaults = {"batch.micro_batch_size": 8}
    return parse(
        text.split(),
        program="tasks/main.py",
        defaults=defaults,
        world_size=world,
        read_saved=saved,
        check_disk=check_disk,
        task=True,
    )


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory `ck` with a checkpoint, as far as a command looks at it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ck" / "iter_0000010").mkdir(parents=True)
    (tmp_path / "ck" / "iter_0000010" / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("text", "loads", "finetune", "trains"),
    [
        (TRAIN, "ck", True, True),
        (TRAIN.replace("--pretrained-checkpoint", "--load"), "ck", False, True),
        (TRAIN.replace("--epochs 2", "--epochs 0"), "ck", True, False),
        (TRAIN + " --skip-train", "ck", True, False),
        ("--task MNLI --load ck --valid-data b", "ck", True, False),
        (ASK, "ck", True, False),
    ],
)
def test_settings_follow_from_the_task(text: str, loads: str, finetune: bool, trains: bool) -> None:
    config = parse_task(text).config
    assert (config.checkpoint.load, config.checkpoint.finetune, not config.eval.skip_train) == (loads, finetune, trains)
    kind = TASKS[config.task.task or ""]
    assert (config.model.architecture, config.model.task_head, config.model.labels) == (
        kind.architecture,
        kind.head,
        kind.labels,
    )
    assert (config.model.num_layers, config.data.seq_length, config.batch.micro_batch_size) == (2, 64, 8)


def test_results_lie_beside_checkpoints() -> None:
    assert parse_task(f"{ASK} --save s").config.task.results_path == "s/results.json"
    assert parse_task(f"{ASK} --save s --results-path r").config.task.results_path == "r"
    assert parse_task(ASK).config.task.results_path is None


def test_a_given_size_is_kept_and_checked_later() -> None:
    assert parse_task(f"{TRAIN} --seq-length 32 --num-layers 3").config.model.num_layers == 3


CASES = [
    ("task_named", "--load ck --valid-data b", ["`--task` is missing, and has no default"]),
    ("model_named", "--task MNLI --train-data a --epochs 2 --lr 1 --seq-length 8", ["`--load` is missing: the checkpoint"]),
    ("model_named", f"{TRAIN} --load other", ["`--pretrained-checkpoint ck` and `--load other` exclude each other"]),
    ("task_data", "--task MNLI --load ck", ["`--valid-data` is missing"]),
    ("task_data", TRAIN.replace("--valid-data b", "--skip-train"), ["`--valid-data` is missing"]),
    ("task_data", TRAIN.replace("--epochs 2", ""), ["`--train-data a` needs `--epochs`"]),
    ("task_data", "--task MNLI --load ck --valid-data b --epochs 2", ["`--epochs 2` needs `--train-data`"]),
    ("task_data", f"{ASK} --train-data a --epochs 0", ["`--train-data a` does not go with --task WIKITEXT103", "`--epochs 0`"]),
    ("pretraining_settings", f"{TRAIN} --train-iters 5", ["`--train-iters 5` belongs to pretraining"]),
    ("pretraining_settings", f"{TRAIN} --data-path x", ["`--data-path x` belongs to pretraining"]),
    ("pretraining_settings", f"{TRAIN} --mock-data", ["`--mock-data` belongs to pretraining"]),
    ("pretraining_settings", f"{TRAIN} --data-args-path x", ["`--data-args-path x` belongs to pretraining"]),
    ("whole_sequences", f"{ASK} --context-parallel-size 2", ["`--context-parallel-size 2` is for pretraining"]),
    ("windows", f"{ASK} --overlapping-eval 65", ["`--overlapping-eval 65` is more than `--seq-length 64`"]),
]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TRAIN.replace("MNLI", "mnli"), "`--task mnli` is not known"),
        (f"{ASK} --train-data a", "`--train-data a` does not go with"),
    ],
)
def test_one_mistake_is_told_once(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task(text)
    assert [str(p)[: len(says)] for p in caught.value.problems] == [says]


@pytest.mark.parametrize(("rule", "text", "messages"), CASES)
def test_a_rule_has_its_message(rule: str, text: str, messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task(text, world=2 if "parallel" in text else 1)
    found = [str(p) for p in caught.value.problems if "--num-layers" not in str(p) and "hidden-size" not in str(p)]
    found = [p for p in found if "heads" not in p and "max-position" not in p]  # of a model that no checkpoint names
    assert len(found) >= len(messages) and all(any(p.startswith(m) for p in found) for m in messages), found


def test_every_rule_is_tested() -> None:
    assert {r.__name__ for r in TASK_RULES if r not in EVERY_RUN} == {case[0] for case in CASES}


def test_files_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "tsv").write_text("x")
    (tmp_path / "set.idx").write_text("x")

    def said(task: str, word: str) -> list[str]:
        case_config = replace(RunSettings(), task=replace(RunSettings().task, task=task, valid_data=(word,)))

        return [str(p) for p in task_files(resolved_check(case_config))]

    assert said("MNLI", "tsv") == said("RACE", "dir") == said("PERPLEXITY", "set") == []
    assert said("MNLI", "gone") == ["`--valid-data gone` does not exist"]
    assert said("RACE", "tsv") == ["`--valid-data tsv` is a file; RACE needs directories"]
    assert said("SQUAD", "dir") == ["`--valid-data dir` is a directory; SQUAD needs files"]
    assert said("LAMBADA", "set") == ["`--valid-data set` does not exist"]


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task("--task MNLI --load ck --epochs 2 --train-iters 3 --micro-batch-size 0", check_disk=True)
    assert len(caught.value.problems) == 4
