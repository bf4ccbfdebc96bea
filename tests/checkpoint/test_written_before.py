"""Checkpoints and datasets that an earlier version has written open, and runs go on from them with that version's losses."""

from __future__ import annotations

import contextlib
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from megatron.config.command_line.parse import parse
from megatron.data.indexed import IndexedDataset
from megatron.interop.checked_export import export_hf
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.launch.watchdog import Watchdog
from megatron.train.loop import advance
from megatron.train.pretraining import data_openers, prepare_pretraining
from megatron.train.resume import restore
from megatron.train.resumed_schedule import choose_schedule
from megatron.train.run import build_run

ROOT = Path(__file__).parents[2]
BEFORE = ROOT / "tests" / "written_before"
RUNS = json.loads((BEFORE / "commands.json").read_text())
VALUES = ("lm_loss", "sop_loss", "grad_norm")
SAVED_AT, LAST = 3, 6
TP_PP = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
# Run, and a layout that is not the one it was saved in: ranks and flags.
OTHERS = {
    "gpt": (4, f"{TP_PP} --use-distributed-optimizer"),
    "gpt_tp2_pp2": (1, ""),
    "llama": (4, f"{TP_PP} --pipeline-schedule zb-h1"),
    "bert": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
}


def go_on(name: str, layout: str, cache: str) -> list[tuple[float, ...]]:
    """Runs on every rank: open that run's checkpoint and go on to its end; the losses and gradient norm of each step."""
    run = RUNS[name]
    env = LaunchEnvironment(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else LaunchEnvironment(0, 1)
    defaults = {"model.architecture": "bert"} if "bert" in run["program"] else {}
    with contextlib.chdir(BEFORE):  # data under the names that the checkpoint has for them
        words = [*f"{run['flags']} {layout} --load {name} --data-cache-path".split(), cache]
        parsed = parse(words, program=run["program"], defaults=defaults, world_size=env.world_size)
        prepared = prepare_pretraining(parsed, Watchdog())
        job = Job(env, torch.device("cpu"), "gloo" if dist.is_initialized() else None)
        opened = build_run(prepared.config, job, schedule=choose_schedule(prepared.source, prepared.config))
        assert restore(prepared.source, opened) == [] and opened.state.iteration == SAVED_AT
        training, _ = data_openers(opened, prepared)
        loader, curve = training(), []
        for _ in range(SAVED_AT, LAST):
            report = opened.step(loader.next_batches(4), opened.state)
            advance(opened, report)
            curve.append(tuple(value for key in VALUES if (value := getattr(report, key)) is not None))
        loader.close()
    return curve


def losses_before(name: str) -> list[tuple[float, ...]]:
    """Read what the earlier version wrote of the steps after its checkpoint."""
    lines = [json.loads(line) for line in (BEFORE / name / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in VALUES if key in line) for line in lines if line["iteration"] > SAVED_AT]


@pytest.mark.parametrize("same", [True, False], ids=["same layout", "another layout"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_the_losses_of_the_version_that_saved(name, same, tmp_path):
    ranks, layout = (RUNS[name]["ranks"], RUNS[name]["layout"]) if same else OTHERS[name]
    arguments = name, layout, str(tmp_path)
    curves = [go_on(*arguments)] if ranks == 1 else on_ranks(ranks, go_on, *arguments)
    expected = losses_before(name)
    assert len(expected) == LAST - SAVED_AT and all(len(step) == 2 + (name == "bert") for step in expected)
    for curve in curves:
        for step, before in zip(curve, expected, strict=True):
            assert step == pytest.approx(before, rel=1e-6)


def test_the_datasets_read_as_they_were_written():
    for prefix, sequences, tokens in (("pages_text_document", 12, 6011), ("corpus_text_sentence", 120, 780)):
        dataset = IndexedDataset(str(BEFORE / prefix))
        read = [dataset[number] for number in range(len(dataset))]
        assert (len(read), sum(map(len, read)), dataset.token_count) == (sequences, tokens, tokens)
    *first, end = IndexedDataset(str(BEFORE / "pages_text_document"))[0].tolist()
    assert end == 256 and bytes(first).decode().startswith("History of digit")


@pytest.mark.parametrize("name", RUNS)
def test_it_is_whole_byte_for_byte_and_damage_is_found(name, tmp_path, monkeypatch, capsys):
    verify = runpy.run_path(str(ROOT / "tools" / "verify_checkpoint.py"))["main"]
    monkeypatch.setattr("sys.argv", ["verify_checkpoint.py", str(BEFORE / name)])
    assert verify() == 0 and "all as the manifest says" in capsys.readouterr().out
    shutil.copytree(BEFORE / name, tmp_path / name)
    shard = next((tmp_path / name / "iter_0000003").glob("shard_*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["verify_checkpoint.py", str(tmp_path / name)])
    assert verify() == 1 and shard.name in capsys.readouterr().err


def test_one_becomes_a_hugging_face_directory_with_its_logits(tmp_path, capsys):
    pytest.importorskip("transformers")
    assert export_hf(BEFORE / "gpt_tp2_pp2", tmp_path / "hf") == BEFORE / "gpt_tp2_pp2" / "iter_0000003"
    assert "transformers opens it; logits differ by at most" in capsys.readouterr().out
