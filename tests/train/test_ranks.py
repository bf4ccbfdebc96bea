"""What the ranks of a run must agree on, and what a hang costs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from ranks import on_ranks
from reference import LLAMA, Setting, micro_batches, start

from megatron.checkpoint.layout import CheckpointError
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.train.resume import Source, agree


def sources(folders: list[str | None]) -> str:
    mesh = Mesh.build(Grid(dp=2), dist.get_rank())
    folder = folders[mesh.rank]
    try:
        agree(Source(None if folder is None else Path(folder)), mesh.world)
    except CheckpointError as error:
        return str(error)
    return "agreed"


def test_ranks_that_see_different_checkpoints_stop(tmp_path):
    for name, text in {"a/iter_0000001": "one", "b/iter_0000001": "one", "c/iter_0000001": "two"}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(text)
    a, b, c = (str(tmp_path / x / "iter_0000001") for x in "abc")
    assert on_ranks(2, sources, [a, b]) == ["agreed", "agreed"]  # the same checkpoint under two paths
    assert on_ranks(2, sources, [None, None]) == ["agreed", "agreed"]
    for views in ([a, c], [a, None]):
        first, second = on_ranks(2, sources, views)
        assert first == second and "the ranks see different checkpoints: rank 0: iter_0000001" in first


def timeouts() -> list[timedelta]:
    mesh = Mesh.build(Grid(tp=2, dp=2), dist.get_rank(), timedelta(seconds=77))
    groups = [axis.group for axis in (mesh.tp, mesh.dp, mesh.tp_pp, mesh.world) if axis.group is not None]
    return [group._get_backend(dist.distributed_c10d._get_pg_default_device(group)).options._timeout for group in groups]


def test_the_timeout_holds_on_every_axis():
    for seen in on_ranks(4, timeouts):
        assert len(seen) == 4 and set(seen) == {timedelta(seconds=77)}


def zeros(setting: Setting) -> int | None:
    run = start(setting, 1)
    run.optimizer.log_zeros = True
    return run.step(micro_batches(setting, 127, 0, run.mesh.dp.rank, run.mesh.dp.size), run.state).zeros


def test_the_number_of_zeros_does_not_count_padding():
    setting = Setting(LLAMA)  # untied: the rows of tokens that did not occur have no gradient
    alone = zeros(setting)
    assert alone
    assert set(on_ranks(2, zeros, replace(setting, tp=2))) == {alone}
