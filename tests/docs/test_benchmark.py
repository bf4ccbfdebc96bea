"""The benchmark compares like with like: at one small size, every contender learns the same text at the same pace."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import on_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train as benchmark
from cases import CASES, Case, Dims

from megatron.config.resolve import resolve
from megatron.config.schema import ModelConfig, RunConfig
from megatron.mesh.launch import job
from megatron.mesh.place import Place
from megatron.model.size import flops_per_token

TINY = Dims(layers=2, width=32, heads=4, seq=16, vocab=96, micro_batch=4)


def losses_of(case: Case) -> dict[str, list[float]]:
    """The losses of one round of six steps, on this rank."""
    place = Place.of(os.environ) if case.ranks > 1 else Place()
    with job(place) as started:
        steps = {name: benchmark.CONTENDERS[name](case, started) for name in case.contenders}
        found = benchmark.take_turns(case, steps, 2, started)
    losses: dict[str, list[float]] = found["losses"]
    assert all(speed > 0 for speeds in found["tokens_per_second"].values() for speed in speeds)
    return losses


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.device == "cpu" and name != "gpt2"])
def test_contenders_do_equal_work(name: str) -> None:
    case = replace(CASES[name], dims=TINY, steps=6)
    losses = losses_of(case) if case.ranks == 1 else on_ranks(case.ranks, losses_of, case)[0]
    assert set(losses) == set(case.contenders)
    for contender, values in losses.items():
        assert values[0] == pytest.approx(4.56, abs=0.1), f"{contender} does not begin at ln 96"
        assert values[-1] < values[0] - 0.002, f"{contender} does not learn"
        assert values[-1] - values[0] == pytest.approx(losses["ours"][-1] - losses["ours"][0], rel=0.5), contender


def test_the_table_names_ratios_and_losses() -> None:
    speeds = {"ours": [200.0, 220.0, 210.0], "transformers": [100.0, 100.0, 100.0], "plain-torch": [210.0, 210.0, 210.0]}
    losses = {name: [9.0, 8.0] for name in speeds}
    result = {"case": "small", "chip": "CPU", "peak_tflops": None, "tokens_per_second": speeds, "losses": losses}
    lines = benchmark.table(result).splitlines()
    assert "2.10x" in lines[3]
    assert "2.00 - 2.20" in lines[3]
    assert all("9.000 -> 8.000" in line for line in lines[2:])
    assert "MFU" not in lines[2]
    assert "MFU" in benchmark.table({**result, "chip": "NVIDIA H200", "peak_tflops": 989.0})


@pytest.mark.parametrize("name", sorted(CASES))
def test_flops_are_those_of_the_package(name: str) -> None:
    dims = CASES[name].dims
    model = ModelConfig(
        num_layers=dims.layers, hidden_size=dims.width, num_attention_heads=dims.heads, max_position_embeddings=dims.seq
    )
    model = resolve(RunConfig(model=model)).model
    assert dims.flops_per_token == pytest.approx(flops_per_token(model, dims.vocab, dims.seq), rel=1e-9)
