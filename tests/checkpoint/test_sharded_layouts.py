"""Checkpoints of sharded optimizer state show no layout: saved with or without it, loaded with or without, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, Setting, dropping, go, start
from torch import Tensor

from megatron.checkpoint.layout import find, verify
from megatron.checkpoint.load import load
from megatron.checkpoint.save import save
from megatron.config.saved import to_json
from megatron.config.schema import OptimConfig, RunConfig
from megatron.parallel.spec import spec_of
from megatron.train.run import Run

BEFORE, AFTER = 3, 2
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sharing(Setting):
    """With the distributed optimizer in small buckets; overlapped, so that a checkpoint may find gathers under way."""

    sharded: bool = False

    def config(self, world: int, steps: int) -> RunConfig:
        config = super().config(world, steps)
        own = dict(use_distributed_optimizer=self.sharded, overlap_param_gather=self.sharded, ddp_bucket_size=3000)
        return replace(config, layout=replace(config.layout, overlap_grad_reduce=True, **own))


TIED = Sharing(
    replace(dropping(GPT2), num_layers=3),
    masked=True,
    optim=OptimConfig(lr=5e-3, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=2),
)
LAYOUTS = {  # world, what differs from one process
    "one process": (1, {}),
    "dp 4, sharded": (4, dict(sharded=True)),
    "dp 2": (2, {}),
    "tp 2 x dp 2, sharded": (4, dict(tp=2, sequence_parallel=True, sharded=True)),
    "pp 2 x dp 2, sharded": (4, dict(pp=2, schedule="zb-h1", sharded=True)),
    "tp 2 x pp 2": (4, dict(tp=2, pp=2, sequence_parallel=True)),
    "dp 2, sharded": (2, dict(sharded=True)),
}
PAIRS = [  # saved in, loaded into
    ("dp 4, sharded", "one process"),
    ("one process", "dp 4, sharded"),
    ("dp 2, sharded", "dp 4, sharded"),
    ("dp 4, sharded", "dp 2, sharded"),
    ("dp 2, sharded", "dp 2"),
    ("dp 2", "tp 2 x dp 2, sharded"),
    ("tp 2 x dp 2, sharded", "pp 2 x dp 2, sharded"),
    ("pp 2 x dp 2, sharded", "tp 2 x pp 2"),
    ("tp 2 x pp 2", "pp 2 x dp 2, sharded"),
]

Held = list[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]]


def run_on(layout: str, function, *args, bf16: bool = False):
    world, changes = LAYOUTS[layout]
    arguments = (replace(TIED, **changes, bf16=bf16), *args)
    return on_ranks(world, function, *arguments) if world > 1 else [function(*arguments)]


def held(run: Run) -> Held:
    """Every rectangle of this rank that a checkpoint keeps: weights and both moments."""
    return [
        (f"{prefix}.{s.name}", s.shape, s.part.slices, s.data.detach().clone())
        for prefix, part in run.parts().items()
        for s in part.shards()
    ]


def model_weights(run: Run) -> dict[str, tuple[tuple[slice, ...], Tensor]]:
    """What the model computes with, by name, where it belongs, without padding."""
    run.optimizer.gathering.finish()
    parameters = [p for stage in run.stages.values() for p in stage.parameters()]
    return {spec_of(p).name: (spec_of(p).part.slices, spec_of(p).local(p.detach()).clone()) for p in parameters}


def train_and_save(setting: Sharing, root: str):
    """What was saved, and the losses of the run that was not interrupted."""
    run = start(setting, BEFORE + AFTER)
    go(run, setting, BEFORE)
    save(Path(root), BEFORE, run.parts(), run.mesh, config=to_json(run.config))
    return held(run), go(run, setting, AFTER)


def load_and_train(setting: Sharing, root: str, expected: dict[str, Tensor]):
    run = start(setting, BEFORE + AFTER)
    loaded = load(find(Path(root)), run.parts(), run.mesh)
    assert loaded.iteration == BEFORE and not loaded.missing and not loaded.unexpected
    mine = held(run)
    for name, _, where, values in mine:
        assert torch.equal(values, expected[name][where]), f"{name} is not what was saved"
    for name, (where, values) in model_weights(run).items():
        assert torch.equal(values, expected[f"model.{name}"][where].to(values.dtype)), f"{name} did not reach the model"
    assert run.optimizer.scalars()["step"] == BEFORE and run.state.consumed_samples == BEFORE * 4
    return sorted({name for name, *_ in mine}), go(run, setting, AFTER)


def joined(ranks: list[Held]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for mine in ranks:
        for name, shape, where, values in mine:
            whole.setdefault(name, torch.full(shape, torch.nan))[where] = values
    assert not any(values.isnan().any() for values in whole.values())
    return whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(layout, bf16) -> directory, whole tensors by name, the losses that follow; made when first asked for."""
    made: dict[tuple[str, bool], tuple[str, dict[str, Tensor], list]] = {}

    def of(layout: str, bf16: bool = False):
        if (layout, bf16) not in made:
            root = str(tmp_path_factory.mktemp("run"))
            results = run_on(layout, train_and_save, root, bf16=bf16)
            made[layout, bf16] = root, joined([mine for mine, _ in results]), results[0][1]
        return made[layout, bf16]

    return of


@pytest.mark.parametrize(("source", "wanted"), PAIRS)
def test_a_run_goes_on_in_another_layout(saved, source, wanted):
    root, whole, expected = saved(source)
    results = run_on(wanted, load_and_train, root, whole)
    assert set().union(*(names for names, _ in results)) == set(whole)
    for _, curve in results:
        for got, reference in zip(curve, expected, strict=True):
            assert got == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize(("source", "wanted"), [("dp 4, sharded", "dp 2"), ("dp 2", "dp 4, sharded")])
def test_main_weights_of_a_bf16_run(saved, source, wanted):
    """fp32 main weights come back bit for bit, and the model gets them rounded, from whichever rank owns them."""
    root, whole, _ = saved(source, True)
    assert any((whole[n] != whole[n].bfloat16().float()).any() for n in whole if n.startswith("model."))
    run_on(wanted, load_and_train, root, whole, bf16=True)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "sharded" in layout])
def test_what_is_on_the_disk_does_not_show_the_layout(saved, layout):
    """The names, shapes and bytes of one process; every rank writes a part."""
    root, whole, _ = saved(layout)
    manifest, alone = verify(find(Path(root))), verify(find(Path(saved("one process")[0])))
    assert {n: (r.dtype, r.shape) for n, r in manifest.tensors.items()} == {
        n: (r.dtype, r.shape) for n, r in alone.tensors.items()
    }
    assert manifest.tensors.keys() == whole.keys()
    world = LAYOUTS[layout][0]
    files = {piece.file for record in manifest.tensors.values() for piece in record.pieces}
    assert len(files) == world
    slices = world // (2 if "x" in layout else 1)  # data-parallel ranks
    assert all(len(record.pieces) <= 3 * slices * 2 for record in manifest.tensors.values())
