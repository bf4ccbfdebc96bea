"""A normalisation that another package brings: known by its class alone, it trains, is saved and gone on with on any layout."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

import pytest
import torch
import toy_norms
from installed import install
from ranks import on_ranks
from reference import BERT, GPT2, LLAMA, NamedSlices, Setting, max_relative_error, trajectory, with_dropout, worst
from safetensors.torch import load_file
from source_files import ROOT
from torch import Tensor

from megatron.config import normalizations
from megatron.config.resolve import resolve_model
from megatron.config.schema import MemoryConfig
from megatron.interop.families.table import family_for_export
from megatron.interop.megatron_args import unsupported_by_megatron
from megatron.mesh.mesh import Axis
from megatron.model.norm import make_norm
from megatron.parallel.cost import MicroBatchShape, module_activation_bytes
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel

STEPS = 6
MODELS = {
    "gpt2": Setting(replace(with_dropout(GPT2), normalization="DynamicTanh"), masked=True),
    "llama": Setting(replace(LLAMA, normalization="DynamicTanh", num_layers=3)),
    "bert": Setting(replace(BERT, normalization="DynamicTanh")),
}


@contextmanager
def registered() -> Iterator[None]:
    """As it is where a package with an entry point is installed."""
    toy = EntryPoint("DynamicTanh", "toy_norms:DynamicTanh", normalizations.GROUP)
    with patch.object(
        normalizations, "NORMALIZATIONS", MappingProxyType({**normalizations.NORMALIZATIONS, "DynamicTanh": toy})
    ):
        yield


def train(setting: Setting) -> tuple[list[tuple[float, ...]], NamedSlices, NamedSlices]:
    with registered():
        return trajectory(setting, STEPS)


@cache
def one_process(name: str) -> tuple[list[tuple[float, ...]], NamedSlices, NamedSlices]:
    return train(MODELS[name])


SHARED = dict(tp=2, sequence_parallel=True)
AGAIN = MemoryConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LAYOUTS = {  # world, what differs from one process
    "tp 2": (2, dict(tp=2)),
    "tp 2, sequence": (2, SHARED),
    "tp 2, sequence, recomputed": (2, dict(SHARED, memory=AGAIN)),
    "tp 2 x pp 2": (4, dict(tp=2, pp=2)),
    "tp 2 x pp 2, sequence": (4, dict(SHARED, pp=2)),
    "tp 2 x pp 2, sequence, zb-h1": (4, dict(SHARED, pp=2, schedule="zb-h1")),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_run_of_one_process(layout: str, name: str) -> None:
    (world, changes), (expected, initial, final) = LAYOUTS[layout], one_process(name)
    learnt = {parameter for parameter, (_, values) in final.items() if parameter.endswith("norm.steepness")}
    assert len(learnt) >= 2 * 2 + 1 and not any(final[n][1].equal(initial[n][1]) for n in learnt)
    for curve, begun, ended in on_ranks(world, train, replace(MODELS[name], **changes)):
        assert max_relative_error(initial, begun) == 0.0
        assert worst(curve, expected) < 1e-5
        assert max_relative_error(final, ended) < 1e-2  # Adam divides noise by noise where a gradient is zero but for rounding


def test_its_parameters_are_what_they_say() -> None:
    """Whole on every rank, summed where each sees a slice of the sequence, and without weight decay."""
    model = resolve_model(replace(GPT2, normalization="DynamicTanh", hidden_size=48))
    with registered():
        for sequence_parallel in (False, True):
            norm = make_norm(model, TensorParallel(Axis("tp", 2, 1, (0, 1)), sequence_parallel))
            specs = {name: param_spec(parameter) for name, parameter in norm.named_parameters()}
            assert {name: spec.shape for name, spec in specs.items()} == {"weight": (48,), "steepness": (1,)}
            axes = {"tp"} if sequence_parallel else set()
            assert all(spec.sum_grad_over == axes and not spec.decay for spec in specs.values())


def test_the_norm_keeps_the_bytes_that_it_declares() -> None:
    """Between forward and backward pass, beside its parameters."""
    with registered():
        norm = make_norm(resolve_model(replace(GPT2, normalization="DynamicTanh")), TensorParallel.alone())
    x, kept = torch.randn(16, 3, 32, requires_grad=True), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.fill_(1.0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x)
    activations = sum(size for place, size in kept.items() if place not in {p.data_ptr() for p in norm.parameters()})
    assert activations == module_activation_bytes(norm, MicroBatchShape(rows=3, seq=16, hidden=32, element=4)).saved > 0


def test_exports_refuse_it_in_words() -> None:
    model = resolve_model(replace(GPT2, normalization="DynamicTanh"))
    with pytest.raises(ValueError, match=r"DynamicTanh: it has LayerNorm; .* DynamicTanh: it has RMSNorm"):
        family_for_export(model)
    assert unsupported_by_megatron(model, 1, 1) == ["it has LayerNorm and RMSNorm (--normalization DynamicTanh)"]
    assert unsupported_by_megatron(replace(model, normalization="RMSNorm"), 1, 1) == []


# The command line, in processes that find an installed package.

SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 "
    "--global-batch-size 4 --lr 1e-2 --lr-decay-style constant --log-interval 1 --eval-iters 0 --mock-data --save-interval 2 "
    "--tokenizer-type ByteTokenizer"
)
LAYOUT = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel")


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment in which a package with the entry point is installed."""
    known = ("DynamicTanh = toy_norms:DynamicTanh", "gone = toy_norms_of_old:Norm", "wrong = toy_norms:NOT_A_CLASS")
    return install(tmp_path / "site", toy_norms, "megatron.normalizations", (*known, "RMSNorm = toy_norms:DynamicTanh"))


def pretrain(environment: dict[str, str], *flags: str, ranks: int = 1) -> tuple[int, str]:
    """Exit status and errors of the first of so many ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": s.getsockname()[1]}
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *SMALL.split(), *flags]
    started = []
    for rank in range(ranks):
        place = {name: str(value) for name, value in {**job, "RANK": rank, "LOCAL_RANK": rank}.items()}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**environment, **place}))
    said = [process.communicate(timeout=200)[1] for process in started]
    return started[0].returncode, said[0]


def losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if "split" not in line]


def test_an_installed_package_brings_a_normalisation(installed: dict[str, str], tmp_path: Path) -> None:
    """Trained and saved on one process; gone on with there, on four ranks, and on one process again."""
    toy = ("--normalization", "DynamicTanh", "--train-iters")
    straight, again, four = tmp_path / "straight", tmp_path / "again", tmp_path / "four"
    assert pretrain(installed, *toy, "6", "--save", str(straight))[0] == 0
    expected, latest = losses(straight), straight / "latest_checkpointed_iteration.txt"
    assert len(expected) == 6
    held = load_file(straight / "iter_0000006" / "shard_00000.safetensors")
    assert held["model.layers.1.mlp_norm.steepness"].shape == (1,)
    latest.write_text("4")
    assert pretrain(installed, *toy, "6", "--load", str(straight), "--save", str(again))[0] == 0
    assert losses(again) == expected[4:]
    latest.write_text("2")
    assert pretrain(installed, *toy, "4", *LAYOUT, "--load", str(straight), "--save", str(four), ranks=4)[0] == 0
    assert pretrain(installed, *toy, "6", "--save", str(four), "--auto-resume")[0] == 0
    assert losses(four) == pytest.approx(expected[2:], rel=1e-5)
    without = {**os.environ, "PYTHONPATH": str(ROOT)}
    status, said = pretrain(without, "--train-iters", "7", "--load", str(four), "--use-checkpoint-args")
    assert status == 2 and "DynamicTanh" in said and "legal: LayerNorm, RMSNorm" in said


def test_what_cannot_be_loaded_is_said_in_a_line(installed: dict[str, str]) -> None:
    """And no package takes one of our own names."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from legal_run import problems\n"
        "from megatron.config.normalizations import norm_class\n"
        "for name in ('DynamicTanh', 'RMSNorm', 'DynamicTan', 'gone', 'wrong'): print(problems(f'--normalization {name}'))\n"
        "print(norm_class('DynamicTanh').__module__, norm_class('RMSNorm').__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    toy, own, unknown, gone, wrong, modules = done.stdout.splitlines()
    assert toy == own == "[]" and modules == "toy_norms megatron.model.norm"
    assert "`--normalization DynamicTan` is not known; legal: LayerNorm, RMSNorm, DynamicTanh, gone, wrong" in unknown
    assert "needs toy_norms_of_old:Norm, which cannot be loaded: No module" in gone
    assert "needs toy_norms:NOT_A_CLASS, which is not a class" in wrong
