"""Agreement of a run's ranks on data and settings, and the time that a hang costs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import LLAMA, Setting, micro_batches

from megatron.checkpoint.layout import CheckpointError
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.train.resume import StateSource, require_same_checkpoint
from megatron.train.run import build_run


def sources(folders: list[str | None]) -> str:
    mesh = Mesh.build(Grid(dp=2), dist.get_rank())
    folder = folders[mesh.rank]
    try:
        require_same_checkpoint(StateSource(None if folder is None else Path(folder)), mesh.world)
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
    groups = [axis.group for axis in (mesh.tp, mesh.dp, mesh.dp_cp, mesh.world) if axis.group is not None]
    return [group._get_backend(dist.distributed_c10d._get_pg_default_device(group)).options._timeout for group in groups]


def test_the_timeout_holds_on_every_axis():
    for seen in on_ranks(4, timeouts):
        assert len(seen) == 4 and set(seen) == {timedelta(seconds=77)}


def counts(setting: Setting, sharded: bool = False) -> tuple[int | None, float | None]:
    """Zeros in the gradient of a step, and the norm of the parameters after it, rounded."""
    env = LaunchEnvironment(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else LaunchEnvironment(0, 1)
    config = setting.config(env.world_size, 1)
    log = replace(config.log, log_num_zeros_in_grad=True, log_params_norm=True)
    config = replace(config, layout=replace(config.layout, use_distributed_optimizer=sharded), log=log)
    run = build_run(config, Job(env, torch.device("cpu"), "gloo" if dist.is_initialized() else None))
    report = run.step(micro_batches(setting, 127, 0, run.mesh.dp.rank, run.mesh.dp.size), run.state)
    return report.zeros, None if report.params_norm is None else round(report.params_norm, 4)


def test_zeros_and_norm_of_the_parameters_are_the_same_on_every_layout():
    """Untied, the rows of tokens that did not occur have no gradient; tied, the first and the last stage hold one matrix.

    Without biases: that of the keys has a gradient that is rounding alone, with a zero here and there.
    """
    for tied in (False, True):
        setting = Setting(replace(LLAMA, untie_embeddings_and_output_weights=not tied))
        alone = counts(setting)
        assert alone[1] and bool(alone[0]) is not tied
        for layout in (dict(tp=2), dict(pp=2), dict(cp=2), {}):
            assert set(on_ranks(2, counts, replace(setting, **layout))) == {alone}, layout
        assert set(on_ranks(2, counts, setting, True)) == {alone}
