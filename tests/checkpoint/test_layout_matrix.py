"""Whole runs, saved on each of six layouts and continued on each of the six: what a checkpoint holds shows no layout.

Weights, both moments, the loss scale, every counter and the data position come back bit for bit, and the next ten losses are
those of the run that was not interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, Setting, start_run, train_steps, with_dropout
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import verify
from megatron.checkpoint.load import load
from megatron.checkpoint.save import save
from megatron.config.command_line.saved import to_json
from megatron.config.schema import OptimSettings, RunConfig
from megatron.interop.hf_export import export_weights
from megatron.optim.precision import Precision
from megatron.optim.scaler import DynamicScaler
from megatron.parallel.spec import param_spec
from megatron.train.run import Run

BEFORE, AFTER = 3, 10
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ShardedSetting(Setting):
    """With the distributed optimizer in small buckets; overlapped, so that a checkpoint may find gathers under way."""

    sharded: bool = False

    def config(self, world: int, steps: int) -> RunConfig:
        config = super().config(world, steps)
        own = dict(use_distributed_optimizer=self.sharded, overlap_param_gather=self.sharded, ddp_bucket_size=20000)
        return replace(config, layout=replace(config.layout, overlap_grad_reduce=self.sharded, **own))


TIED = ShardedSetting(
    replace(with_dropout(GPT2), num_layers=4),
    masked=True,
    optim=OptimSettings(lr=1e-3, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=2),
)
LAYOUTS = {  # world, what differs from one process
    "one process": (1, dict(micro_batch=4)),
    "tp 2 x pp 2, zb-v": (4, dict(tp=2, pp=2, schedule="zb-v", micro_batch=2)),
    "dp 4, sharded": (4, dict(sharded=True)),
    "pp 2, virtual stages, x dp 2": (4, dict(pp=2, schedule="interleaved", per_virtual_stage=1)),
    "tp 4, sequence parallel": (4, dict(tp=4, sequence_parallel=True, micro_batch=4)),
    "pp 4, gpipe": (4, dict(pp=4, schedule="gpipe")),
}
MORE = {"dp 2": (2, {}), "pp 2 x dp 2, sharded": (4, dict(pp=2, schedule="1f1b", sharded=True))}

Held = list[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]]


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint, and what it must give back: whole tensors by name, counters, and the losses that follow."""

    root: str
    whole: dict[str, Tensor]
    scalars: dict[str, Any]
    curve: list[tuple[float, float]]


def run_on(layout: str, function, *args, bf16: bool = False):
    world, changes = (LAYOUTS | MORE)[layout]
    arguments = (replace(TIED, **changes, bf16=bf16), *args)
    return on_ranks(world, function, *arguments) if world > 1 else [function(*arguments)]


def begin(setting: ShardedSetting) -> Run:
    """A run with a dynamic loss scale, which is exact in fp32, and grows with every second step."""
    with mock.patch.object(Precision, "scaler", lambda _: DynamicScaler(16.0, 1.0, 2, 2)):
        return start_run(setting, BEFORE + AFTER)


def saved_rectangles(run: Run) -> Held:
    """Every rectangle of this rank that a checkpoint keeps: weights and both moments."""
    return [
        (f"{prefix}.{s.name}", s.shape, s.part.slices, s.data.detach().clone())
        for prefix, part in run.parts().items()
        for s in part.shards()
    ]


def scalars(run: Run) -> dict[str, Any]:
    return {prefix: part.scalars() for prefix, part in run.parts().items()}


def model_weights(run: Run) -> dict[str, tuple[tuple[slice, ...], Tensor]]:
    """Return the model's weights by name, without padding, each with its place in the whole tensor."""
    run.optimizer.gatherer.finish()
    parameters = [p for stage in run.stages.values() for p in stage.parameters()]
    return {param_spec(p).name: (param_spec(p).part.slices, param_spec(p).local(p.detach()).clone()) for p in parameters}


def train_and_save(setting: ShardedSetting, root: str):
    """Save in the middle of a run; return what was saved, and the losses of the run, which was not interrupted."""
    run = begin(setting)
    train_steps(run, setting, BEFORE)
    save(Path(root), BEFORE, run.parts(), run.mesh, config=to_json(run.config))
    return saved_rectangles(run), scalars(run), train_steps(run, setting, AFTER)


def load_and_train(setting: ShardedSetting, sources: list[SavedRun], steps: int):
    """From each source in turn; only the first finds a run that is fresh. Names held, and the curve, of each."""
    run, results = begin(setting), []
    for source in sources:
        loaded = load(find_checkpoint(Path(source.root)), run.parts(), run.mesh)
        assert loaded.iteration == BEFORE and not loaded.missing and not loaded.unexpected
        mine = saved_rectangles(run)
        for name, _, where, values in mine:
            assert torch.equal(values, source.whole[name][where]), f"{name} is not what was saved"
        for name, (where, values) in model_weights(run).items():
            expected = source.whole[f"model.{name}"][where].to(values.dtype)
            assert torch.equal(values, expected), f"{name} did not reach the model"
        assert scalars(run) == source.scalars
        results.append(({name for name, *_ in mine}, train_steps(run, setting, steps)))
    return results


def join_rectangles(ranks: list[Held]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for mine in ranks:
        for name, shape, where, values in mine:
            whole.setdefault(name, torch.full(shape, torch.nan))[where] = values
    assert not any(values.isnan().any() for values in whole.values())
    return whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function (layout, bf16) -> SavedRun, which runs each layout once."""
    made: dict[tuple[str, bool], SavedRun] = {}

    def run_once(layout: str, bf16: bool = False) -> SavedRun:
        if (layout, bf16) not in made:
            root = str(tmp_path_factory.mktemp("run"))
            results = run_on(layout, train_and_save, root, bf16=bf16)
            _, counters, curve = results[0]
            assert all(result[1:] == (counters, curve) for result in results), "the ranks disagree"
            made[layout, bf16] = SavedRun(root, join_rectangles([result[0] for result in results]), counters, curve)
        return made[layout, bf16]

    return run_once


def check(sources: list[SavedRun], ranks: list[list[tuple[set[str], list[tuple[float, float]]]]]) -> None:
    """Together the ranks hold everything, and each has the losses and gradient norms of the uninterrupted run."""
    for source, results in zip(sources, zip(*ranks, strict=True), strict=True):
        assert set().union(*(names for names, _ in results)) == set(source.whole)
        for _, curve in results:
            for (loss, norm), (expected, expected_norm) in zip(curve, source.curve, strict=False):
                assert loss == pytest.approx(expected, rel=TOLERANCE)
                assert norm == pytest.approx(expected_norm, rel=10 * TOLERANCE)


@pytest.mark.parametrize("wanted", LAYOUTS)
def test_a_run_goes_on_from_every_layout(saved, wanted):
    sources = [saved(layout) for layout in LAYOUTS]
    check(sources, run_on(wanted, load_and_train, sources, AFTER))


def test_the_saved_run_has_a_moved_scale_and_falling_losses(saved):
    """The scale has moved, the moments are not zero, and the losses fall."""
    source = saved("one process")
    assert source.scalars["train"]["scaler"] == {"scale": 32.0, "updates": 1, "patience": 2}
    assert source.scalars["optimizer"]["step"] == source.scalars["train"]["iteration"] == BEFORE
    assert source.scalars["train"]["consumed_samples"] == 4 * BEFORE
    assert all(tensor.abs().max() > 0 for tensor in source.whole.values())
    assert len({loss for loss, _ in source.curve}) == AFTER


@pytest.mark.parametrize(
    ("source", "wanted"), [("dp 2", "pp 2 x dp 2, sharded"), ("pp 2 x dp 2, sharded", "dp 2"), ("dp 4, sharded", "dp 2")]
)
def test_main_weights_of_a_bf16_run(saved, source, wanted):
    """fp32 main weights come back bit for bit, and the model gets them rounded, from whichever rank owns them."""
    given = saved(source, True)
    assert any((given.whole[n] != given.whole[n].bfloat16().float()).any() for n in given.whole if n.startswith("model."))
    run_on(wanted, load_and_train, [given], 1, bf16=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_on_the_disk_does_not_show_the_layout(saved, layout):
    """The names, types, shapes and bytes of one process, every rank writes a part; a tied matrix has its one name."""
    given, world = saved(layout), LAYOUTS[layout][0]
    manifest, alone = verify(find_checkpoint(Path(given.root))), verify(find_checkpoint(Path(saved("one process").root)))
    assert {n: (r.dtype, r.shape) for n, r in manifest.tensors.items()} == {
        n: (r.dtype, r.shape) for n, r in alone.tensors.items()
    }
    assert manifest.tensors.keys() == given.whole.keys() and "model.head.weight" not in manifest.tensors
    files = sorted(find_checkpoint(Path(given.root)).glob("shard_*.safetensors"))
    assert len(files) == world
    held_there = sum(t.numel() for file in files for t in load_file(file).values())
    assert held_there == sum(t.numel() for t in given.whole.values())
    # A slice of flat memory is at most three rectangles of a matrix.
    assert all(len(record.pieces) <= 3 * world for record in manifest.tensors.values())


def resave(setting: ShardedSetting, source: str, root: str) -> None:
    run = begin(setting)
    load(find_checkpoint(Path(source)), run.parts(), run.mesh)
    save(Path(root), BEFORE, run.parts(), run.mesh, config=to_json(run.config))


@pytest.mark.parametrize("layout", ["tp 2 x pp 2, zb-v", "pp 2, virtual stages, x dp 2", "pp 4, gpipe"])
def test_the_export_is_that_of_one_process(saved, layout, tmp_path):
    root = saved(layout).root
    resave(TIED, root, str(tmp_path / "alone"))
    files = []
    for name, source in (("pipeline", root), ("one", tmp_path / "alone")):
        export_weights(find_checkpoint(Path(source)), tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] and len(files[0]) > 4 * 127 * 32
