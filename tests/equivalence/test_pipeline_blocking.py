"""Transfers whose calls return only when both ends are there, as a GPU's do under blocking launches: every schedule ends.

And it is the same run: whether receives are early, and in which order transfers stand, changes no number.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import LLAMA, Setting, micro_batches, train_steps

from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.pipeline.schedules.lower import EARLY
from megatron.pipeline.schedules.schedule import SCHEDULES
from megatron.pipeline.transfer import Channels, PendingReceive
from megatron.train.run import Run, build_run

CPU = torch.device("cpu")
RANKS = 4
SETTING = Setting(replace(LLAMA, num_layers=9), global_batch=6)
STEPS = (6, 2, 6, 2)  # micro-batches of each: the second number is a new program


class WaitedTransfer:
    """A transfer that has been waited for already."""

    def wait(self) -> None:
        pass


class BlockingChannels(Channels):
    """While `blocking`, the two ends of a transfer wait for each other: gloo alone would let a small send go."""

    blocking = False

    def send(self, x: torch.Tensor, peer: int, number: int) -> None:
        super().send(x, peer, number)
        if self.blocking:
            dist.recv(torch.empty(1), self.up.ranks[peer], tag=number)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, peer: int, number: int) -> PendingReceive:
        receiving = super().receive(shape, dtype, peer, number)
        if self.blocking:
            receiving._work.wait()
            receiving._work = WaitedTransfer()
            dist.send(torch.ones(1), self.up.ranks[peer], tag=number)
        return receiving


def scores(run: Run) -> tuple[float, float]:
    """Summed loss and tokens of a validation, 0 where the head is not."""
    out = run.pipeline.evaluate(micro_batches(SETTING, 127, 1000, 0, 1))
    return float(out.loss), float(out.tokens)


def train_and_validate(setting: Setting, always: bool) -> tuple[list[Any], list[Any]]:
    """Losses and gradient norms of the steps, results of two validations among them.

    always: all calls block, as the process was told; else only those of programs that run for the first time.
    """
    there = dist.is_initialized()
    world = dist.get_world_size() if there else 1
    env = LaunchEnvironment(dist.get_rank() if there else 0, world, blocking=always)
    run = build_run(setting.config(world, len(STEPS)), Job(env, CPU, "gloo" if there else None))
    assert run.pipeline.early == (0 if always else EARLY)
    run.pipeline.channels = channels = BlockingChannels(run.mesh.pp, run.mesh.pp_back, CPU)
    curve, validations, seen = [], [], set()
    for count in STEPS:
        channels.blocking = always or count not in seen
        seen.add(count)
        curve += train_steps(run, replace(setting, global_batch=count), 1)
        if count == STEPS[0]:
            channels.blocking = always or not validations
            validations.append(scores(run))
    return curve, validations


@cache
def one_process() -> tuple[list[Any], list[Any]]:
    return train_and_validate(SETTING, False)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocking_calls(schedule, always):
    virtual = 1 if schedule == "interleaved" else None
    setting = replace(SETTING, pp=RANKS, schedule=schedule, per_virtual_stage=virtual)
    curve, validations = one_process()
    results = on_ranks(RANKS, train_and_validate, setting, always)
    assert all(found == curve for found, _ in results)
    scored = [tuple(map(sum, zip(*each, strict=True))) for each in zip(*(scores for _, scores in results), strict=True)]
    assert scored == validations
