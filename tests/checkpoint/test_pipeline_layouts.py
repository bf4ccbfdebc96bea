"""Whole runs, saved in one pipeline and continued in another: the same weights and moments, the same losses afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, Setting, dropping, go, start
from safetensors.torch import load_file

from megatron.checkpoint.hf import export_hf
from megatron.checkpoint.layout import find, read_manifest, read_state, verify
from megatron.checkpoint.load import load
from megatron.checkpoint.save import save
from megatron.config.saved import to_json
from megatron.config.schema import OptimConfig
from megatron.train.run import Run

BEFORE, AFTER = 3, 3
TOLERANCE = 1e-5
TIED = Setting(
    replace(dropping(GPT2), num_layers=5),
    masked=True,
    optim=OptimConfig(lr=5e-3, clip_grad=1.0, lr_decay_style="cosine", lr_warmup_iters=2),
)
LAYOUTS = {  # world, what differs from one process
    "one process": (1, {}),
    "pp 2, 1f1b": (2, dict(pp=2, schedule="1f1b")),
    "tp 2 x pp 2, zb-h1": (4, dict(tp=2, pp=2, schedule="zb-h1", sequence_parallel=True)),
    "pp 2, interleaved": (2, dict(pp=2, schedule="interleaved", per_virtual_stage=1)),
    "pp 2 x dp 2, zb-v": (4, dict(pp=2, schedule="zb-v")),
    "pp 4, gpipe": (4, dict(pp=4, schedule="gpipe")),
}
NAMES = list(LAYOUTS)
# Each layout loads what the next has saved, every second one also what the next but one has: nine pairs of thirty.
PAIRS = [(NAMES[(i + ahead) % len(NAMES)], wanted) for i, wanted in enumerate(NAMES) for ahead in (1, 2)[: 2 - i % 2]]

Held = dict[str, tuple[tuple[int, ...], tuple[slice, ...], torch.Tensor]]


def run_on(layout: str, function, *args):
    world, changes = LAYOUTS[layout]
    arguments = (replace(TIED, **changes), *args)
    return on_ranks(world, function, *arguments) if world > 1 else [function(*arguments)]


def held(run: Run) -> Held:
    """Everything of this rank that a checkpoint keeps as tensors: weights and both moments."""
    return {
        f"{prefix}.{s.name}": (s.shape, s.part.slices, s.data.detach().clone())
        for prefix, part in run.parts().items()
        for s in part.shards()
    }


def train_and_save(setting: Setting, root: str):
    """What was saved, and the losses of the run that was not interrupted."""
    run = start(setting, BEFORE + AFTER)
    go(run, setting, BEFORE)
    save(Path(root), BEFORE, run.parts(), run.mesh, config=to_json(run.config))
    return held(run), go(run, setting, AFTER)


def load_and_train(setting: Setting, root: str, expected: dict[str, torch.Tensor]):
    run = start(setting, BEFORE + AFTER)
    loaded = load(find(Path(root)), run.parts(), run.mesh)
    assert loaded.iteration == BEFORE and not loaded.missing and not loaded.unexpected
    mine = held(run)
    for name, (_, where, values) in mine.items():
        assert torch.equal(values, expected[name][where]), f"{name} is not what was saved"
    scalars = run.optimizer.scalars()
    assert scalars["step"] == BEFORE and run.state.iteration == BEFORE and run.state.consumed_samples == BEFORE * 4
    return set(mine), go(run, setting, AFTER)


def resave(setting: Setting, source: str, root: str) -> None:
    run = start(setting, BEFORE + AFTER)
    load(find(Path(source)), run.parts(), run.mesh)
    save(Path(root), BEFORE, run.parts(), run.mesh, config=to_json(run.config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Layout -> directory, whole tensors by name, the losses that follow; made when first asked for."""
    made: dict[str, tuple[str, dict[str, torch.Tensor], list]] = {}

    def of(layout: str):
        if layout not in made:
            root = str(tmp_path_factory.mktemp("run"))
            results = run_on(layout, train_and_save, root)
            whole: dict[str, torch.Tensor] = {}
            for mine, curve in results:
                assert curve == results[0][1]
                for name, (shape, where, values) in mine.items():
                    whole.setdefault(name, torch.full(shape, torch.nan))[where] = values
            assert not any(values.isnan().any() for values in whole.values())
            made[layout] = root, whole, results[0][1]
        return made[layout]

    return of


@pytest.mark.parametrize(("source", "wanted"), PAIRS)
def test_a_run_goes_on_in_another_pipeline(saved, source, wanted):
    root, whole, expected = saved(source)
    results = run_on(wanted, load_and_train, root, whole)
    assert set().union(*(names for names, _ in results)) == set(whole)
    for _, curve in results:
        for got, reference in zip(curve, expected, strict=True):
            assert got == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_bytes_do_not_show_the_layout(saved, layout):
    """A tied matrix that two stages hold is saved once, under its one name; layers have their global numbers."""
    root, whole, _ = saved(layout)
    manifest = verify(find(Path(root)))
    assert manifest.tensors.keys() == whole.keys() == saved("one process")[1].keys()
    assert all(record.shape == tuple(whole[name].shape) for name, record in manifest.tensors.items())
    files = [load_file(path) for path in sorted(find(Path(root)).glob("shard_*.safetensors"))]
    assert sum(t.numel() for file in files for t in file.values()) == sum(t.numel() for t in whole.values())
    assert read_state(find(Path(root)))["optimizer"]["step"] == BEFORE
    assert "model.head.weight" not in read_manifest(find(Path(root))).tensors


@pytest.mark.parametrize("layout", ["tp 2 x pp 2, zb-h1", "pp 2 x dp 2, zb-v", "pp 4, gpipe"])
def test_the_export_is_that_of_one_process(saved, layout, tmp_path):
    root = saved(layout)[0]
    resave(TIED, root, str(tmp_path / "alone"))
    files = []
    for name, source in (("pipeline", root), ("one", tmp_path / "alone")):
        export_hf(find(Path(source)), tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] and len(files[0]) > 4 * 127 * 32
