"""Weights & Biases, with a stand-in for its package: one run over restarts, each point once; no failure of it is the run's."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from legal_run import problems
from test_program import run

from megatron.config import outputs
from megatron.train import wandb_link
from megatron.train.ending import Exit
from megatron.train.wandb_link import WandbLink
from megatron.train.wandb_run import WandbRun, choose_wandb_run, read_wandb_run

FAKE = Path(__file__).parents[1] / "fake_packages"


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.syspath_prepend(FAKE)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def calls_named(folder: Path, name: str) -> list[dict]:
    path = folder / "calls.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["call"] == name]


def test_one_run_over_restarts_and_each_point_once(flags, tmp_path, wandb, capsys):
    save, folder = tmp_path / "run", tmp_path / "run" / "wandb"
    wanted = [*flags, "--auto-resume", "--wandb-project", "p", "--wandb-exp-name", "n", "--wandb-entity", "e"]
    assert run([*wanted, "--exit-interval", 3]) == Exit.STOPPED
    assert run([*wanted, "--exit-interval", 6]) == Exit.STOPPED
    (save / "latest_checkpointed_iteration.txt").write_text("4\n")  # what a kill after 6 would have left, too
    assert run(wanted) == Exit.FINISHED
    begun = calls_named(folder, "init")
    assert len({call["id"] for call in begun}) == 1 and len(begun) == 3
    assert {(c["project"], c["name"], c["entity"], c["resume"]) for c in begun} == {("p", "n", "e", "allow")}
    assert begun[0]["config"]["optim"]["lr"] == 1e-2 and begun[0]["config"]["world_size"] == 1
    state = json.loads((save / "iter_0000012" / "state.json").read_text())
    assert state["train"]["wandb_run"] == begun[0]["id"]
    points = [(call["step"], tag, value) for call in calls_named(folder, "log") for tag, value in call["values"].items()]
    assert [step for step, tag, _ in points if tag == "lm loss"] == list(range(1, 13))
    assert [step for step, tag, _ in points if tag == "lm loss validation"] == [5, 10, 12]
    assert [step for step, tag, _ in points if tag == "lm loss test"] == [12]
    tags = {"lm loss", "grad-norm", "learning-rate", "loss-scale", "iteration-time", "throughput", "samples vs steps"}
    assert {tag for _, tag, _ in points} == tags | {"lm loss validation", "lm loss test"}
    # The curve is the run's own.
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [v for _, tag, v in points if tag == "lm loss"] == [line["lm_loss"] for line in lines if "split" not in line]
    ends = [call["exit_code"] for call in calls_named(folder, "finish")]
    assert ends == [75, 75, 0] and len(calls_named(folder, "mark_preempting")) == 2
    assert f"W&B: run {begun[0]['id']}, https://wandb.example/run" in capsys.readouterr().out
    assert {call["process"] for call in begun}.isdisjoint({os.getpid()})
    # Weights alone are no reason to go on with it.
    assert run([*flags, "--load", save, "--finetune", "--save", tmp_path / "other", "--wandb-project", "p"]) == 0
    assert calls_named(tmp_path / "other" / "wandb", "init")[0]["id"] != begun[0]["id"]


@pytest.mark.parametrize(("fault", "said"), [("log", "the server says no"), ("init", "no network"), ("hang", "0.2 s were not")])
def test_no_failure_of_it_ends_or_delays_a_run(flags, tmp_path, wandb, monkeypatch, caplog, fault, said):
    monkeypatch.setenv("FAKE_WANDB_FAULT", fault)
    if fault == "hang":
        monkeypatch.setattr(wandb_link, "MAX_END_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING):
        assert run([*flags, "--train-iters", 3, "--eval-iters", 1, "--wandb-project", "p"]) == Exit.FINISHED
    warned = [record.getMessage() for record in caplog.records if record.getMessage().startswith("W&B: ")]
    assert any(said in line for line in warned) and len(warned) == (2 if fault == "init" else 1), warned
    if fault == "log":
        assert calls_named(tmp_path / "run" / "wandb", "finish")[0]["exit_code"] == 0


def test_a_run_that_is_killed_has_failed(tmp_path, wandb):
    init = {"dir": str(tmp_path), "project": "p", "name": None, "config": {}, "id": "x"}
    run = {"id": "x", "iteration": 2, "evaluations": {}, "parent": "", "fork": 0, "settings": ""}
    link = WandbLink({"init": init, "run": run, "record": str(tmp_path / "wandb.json")}, lambda text: None)
    for step, split in ((2, None), (3, None), (2, "validation")):
        link.send({"step": step, "split": split, "values": {"lm loss": "nan"}})
    link._socket.close()  # as the kernel does for a process that is gone
    link.process.wait(60)
    # The validation comes late to a step that is closed, and stands at the next.
    assert [call["step"] for call in calls_named(tmp_path, "log")] == [3, 3]
    assert calls_named(tmp_path, "finish")[0]["exit_code"] == 1
    kept = read_wandb_run(tmp_path / "wandb.json")
    assert (kept.id, kept.iteration, kept.evaluations) == ("x", 3, {"validation": 2})


def test_which_run_a_slice_goes_on_with():
    kept = WandbRun("a", 9, {"validation": 5}, settings="s")
    assert choose_wandb_run("a", 4, kept, "s") == kept == choose_wandb_run("a", 9, kept, "s")
    assert choose_wandb_run("a", 9, kept, "t").id == "a"  # nothing is there twice
    other = choose_wandb_run("a", 4, kept, "t")
    assert other.id not in ("", "a") and (other.iteration, other.parent, other.fork) == (4, "a", 4)
    # The new one is gone on with, though the checkpoint still names the old one.
    further = WandbRun(other.id, 6, {}, "a", 4, "t")
    assert choose_wandb_run("a", 4, further, "t") == further
    assert choose_wandb_run("a", 2, further, "t").id not in ("a", other.id)
    assert choose_wandb_run("a", 4, WandbRun(), "s") == WandbRun("a", 4, settings="s")
    fresh = choose_wandb_run("", 0, WandbRun(), "s")
    assert fresh.id and (fresh.parent, fresh.iteration) == ("", 0)


def test_a_missing_package_is_said_before_any_work(monkeypatch, tmp_path):
    wanted, message = "--wandb-project p", "`--wandb-project p` needs W&B, which is not installed: pip install -e '.[wandb]'"
    folder = ModuleSpec("wandb", None, is_package=True)  # the directory that W&B leaves where it runs
    for spec in (None, folder):
        monkeypatch.setattr(outputs, "find_spec", lambda name, spec=spec: spec)
        assert [line for line in problems(f"{wanted} --save {tmp_path}", check_disk=True) if "wandb" in line] == [message]
    assert not [line for line in problems("--wandb-project= --save x", check_disk=True) if "wandb" in line]
