"""An optimizer for matrices that another package brings: known by its rules alone, it gives the run of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

import pytest
import toy_optimizers
from installed import install
from ranks import on_ranks
from reference import GPT2, LLAMA, start_run, train_steps, with_dropout, worst
from source_files import ROOT
from test_distributed_optimizer import ShardedSetting, difference, held_bytes, join_rectangles, on_one_process, rectangles

from megatron.config import optimizers
from megatron.config.schema import OptimSettings
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.optim.buffers import flat_buffers
from megatron.optim.optimizer import Optimizer
from megatron.plan.enough_memory import rank_states

STEPS = 4
TOY = OptimSettings(optimizer="toy", lr=5e-3, clip_grad=1.0, lr_decay_style="constant")
PLAIN = ShardedSetting(replace(with_dropout(GPT2), num_layers=3), masked=True, optim=TOY, bucket=9000)
UNTIED = replace(PLAIN, model=replace(LLAMA, num_layers=3))
FORMS = {"gpt2": PLAIN, "llama": UNTIED}
ALL = dict(sharded=True, overlap_reduce=True, overlap_gather=True)


def registered():
    """As it is where a package with an entry point is installed."""
    return patch.object(optimizers, "OPTIMIZERS", MappingProxyType({**optimizers.OPTIMIZERS, "toy": toy_optimizers.RULES}))


def train(setting: ShardedSetting, steps: int):
    with registered():
        run = start_run(setting, steps)
        curve = train_steps(run, setting, steps)
        run.optimizer.gatherer.finish()
        return curve, rectangles(run.weights.shards()), rectangles(run.optimizer.shards()), run.optimizer.scalars()


LAYOUTS = {  # world, what differs from one process
    "tp 2": (2, dict(tp=2)),
    "tp 2, sequence": (2, dict(tp=2, sequence_parallel=True)),
    "dp 2": (2, dict()),
    "dp 2, sharded": (2, dict(sharded=True)),
    "tp 2 x dp 2, sharded and overlapped": (4, dict(tp=2, **ALL)),
    "tp 2 x pp 2": (4, dict(tp=2, pp=2)),
    "pp 2 x dp 2, zb-h1, sharded and overlapped": (4, dict(pp=2, schedule="zb-h1", **ALL)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_run_of_one_process(layout, form):
    (world, changes), setting = LAYOUTS[layout], FORMS[form]
    expected, weights, state, scalars = train(on_one_process(setting), STEPS)
    results = on_ranks(world, train, replace(setting, **changes), STEPS)
    for curve, _, _, own in results:
        assert worst(curve, expected) < 1e-4
        assert own == scalars == {"optimizer": "toy", "step": STEPS}
    assert (
        difference(join_rectangles([held for _, held, *_ in results]), join_rectangles([weights])) < 1e-2
    )  # of AdamW's: noise by noise
    own, reference = join_rectangles([held for _, _, held, _ in results]), join_rectangles([state])
    momenta = {f"momentum.{name}" for name, shape, *_ in weights if toy_optimizers.is_matrix(name, shape)}
    rest = {name for name, shape, *_ in weights if not toy_optimizers.is_matrix(name, shape)}
    assert len(momenta) == 3 * {"gpt2": 4, "llama": 5}[form]
    assert reference.keys() == momenta | {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in rest}
    assert difference({n: own[n] for n in momenta}, {n: reference[n] for n in momenta}) < 1e-3


def test_slices_share_the_matrices_out_whole():
    """Each belongs to one data-parallel rank alone, and none of the two has much more than half."""
    held = [state for _, _, state, _ in on_ranks(2, train, replace(PLAIN, sharded=True, bucket=1_000_000), 1)]
    matrices = [{name: values for name, _, _, values in rank if name.startswith("momentum.")} for rank in held]
    shapes = {
        f"momentum.{n}": shape for n, shape, *_ in train(on_one_process(PLAIN), 1)[1] if toy_optimizers.is_matrix(n, shape)
    }
    assert not matrices[0].keys() & matrices[1].keys()
    assert {name: values.shape for rank in matrices for name, values in rank.items()} == shapes
    first, second = (sum(values.numel() for values in rank.values()) for rank in matrices)
    assert abs(first - second) <= max(map(prod, shapes.values()))


def test_it_learns_by_its_own_rule():
    """Not by AdamW's: matrices move by orthogonal steps, whose singular values are near the learning rate."""
    with registered():
        setting = replace(on_one_process(UNTIED), optim=replace(TOY, weight_decay=0.0))
        run = start_run(setting, 1)
        before = join_rectangles([rectangles(run.weights.shards())])
        train_steps(run, setting, 1)
        after = join_rectangles([rectangles(run.weights.shards())])
    for name, values in after.items():
        if toy_optimizers.is_matrix(name, tuple(values.shape)):
            largest = (before[name] - values).svd().S[0]
            assert float(largest) == pytest.approx(TOY.lr, rel=0.05), name
        assert not values.equal(before[name])


def rank_state(setting: ShardedSetting):
    with registered():
        return held_bytes(setting)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_knows_its_bytes(layout):
    world, changes = LAYOUTS[layout]
    setting = replace(UNTIED, **changes)
    config = setting.config(world, 1)
    grid = Grid.from_layout(config.layout, world)
    for *found, pp_rank in on_ranks(world, rank_state, setting):
        with registered():
            (memory,) = rank_states(config, grid, [grid.rank(pp=pp_rank)])
        assert found == [memory.weights, memory.gradients, memory.optimizer]


def test_a_slice_that_cuts_a_matrix_is_refused():
    """The rule's own word lays matrices out whole: without it a slice would hold half of one."""
    with pytest.raises(AssertionError, match=r"this rank's slice cuts layers.*, which its optimizer needs whole"):
        on_ranks(2, train_on_cut_matrices, replace(PLAIN, sharded=True))


def train_on_cut_matrices(setting: ShardedSetting):
    with patch.object(toy_optimizers, "RULES", (replace(toy_optimizers.RULES[0], whole=False), optimizers.ADAMW)):
        return train(setting, 1)


def test_buckets_of_another_optimizer_are_refused():
    with registered():
        run = start_run(on_one_process(PLAIN), 1)
        parameters = [p for stage in run.stages.values() for p in stage.parameters()]
        with pytest.raises(ValueError, match="a bucket was not laid out for the optimizer toy: it has 2 rules"):
            Optimizer(flat_buffers(parameters), TOY, Mesh.single())


# The command line, in a process that finds an installed package.


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment in which a package with the entry point is installed."""
    known = ("toy = toy_optimizers:RULES", "gone = toy_optimizers_of_old:RULES", "wrong = toy_optimizers:MOMENTUM")
    return install(tmp_path / "site", toy_optimizers, "megatron.optimizers", known)


SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 "
    "--global-batch-size 4 --lr 1e-2 --lr-decay-style constant --log-interval 1 --eval-iters 0 --mock-data "
    "--tokenizer-type ByteTokenizer"
)


def pretrain(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *SMALL.split(), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def losses(save: Path) -> list[float]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["lm_loss"] for line in lines if "split" not in line]


def test_an_installed_package_brings_an_optimizer(installed: dict[str, str], tmp_path: Path) -> None:
    """Trained, saved, and gone on with to the same losses; what cannot be loaded is said in a line."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    toy = ("--optimizer", "toy", "--save-interval", "2")
    done = pretrain(installed, *toy, "--train-iters", "4", "--save", str(straight))
    assert done.returncode == 0, done.stderr
    for iterations in ("2", "4"):
        done = pretrain(installed, *toy, "--train-iters", iterations, "--save", str(halves), "--auto-resume")
        assert done.returncode == 0, done.stderr
    assert losses(halves) == losses(straight) and len(losses(straight)) == 4
    adam = pretrain(installed, "--save-interval", "2", "--train-iters", "5", "--save", str(halves), "--auto-resume")
    assert adam.returncode == 2 and "which was made with toy" in adam.stderr
    toi = pretrain(installed, "--optimizer", "toi", "--train-iters", "1")
    assert toi.returncode == 2 and "`--optimizer toi` is not known; legal: adam, sgd, toy, gone, wrong" in toi.stderr
    gone = pretrain(installed, "--optimizer", "gone", "--train-iters", "1")
    assert gone.returncode == 2 and "needs toy_optimizers_of_old:RULES, which cannot be loaded: No module" in gone.stderr
    wrong = pretrain(installed, "--optimizer", "wrong", "--train-iters", "1")
    assert wrong.returncode == 2 and "needs toy_optimizers:MOMENTUM, which is not a tuple of UpdateRule" in wrong.stderr
