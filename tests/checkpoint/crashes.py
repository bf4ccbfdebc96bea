"""Shared by the crash tests: a disk that fails or dies at a given step, and savers of a small state."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sharded_state import build_mesh, build_state

from megatron.checkpoint.storage import Storage
from megatron.config.schema import CheckpointConfig, RunSettings
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.job import Job
from megatron.train.saving import Saver

ASSETS = {"vocab.json": b"{}", "deep/merges.txt": b"a b\n"}


class FaultyStorage(Storage):
    """A disk that calls `act` at step number `at`.

    Steps are before and after everything that is done to the disk, in the middle of the first bytes of a file, and of its
    first tensor.

    Args:
        at: number of the step; None: it only counts.
        act: raises or kills.
        for_ever: at every later step too.
    """

    def __init__(self, at=None, act=None, *, for_ever=False):
        self.at, self.act, self.for_ever, self.steps = at, act, for_ever, 0
        self.lock = threading.Lock()  # a deletion has a thread of its own

    def step(self):
        with self.lock:
            self.steps += 1
            now = self.at is not None and (self.steps - 1 == self.at or (self.for_ever and self.steps - 1 > self.at))
        if now:
            self.act()

    def around(self, work, *args):
        self.step()
        result = work(*args)
        self.step()
        return result

    def free_bytes(self, path):
        return self.around(super().free_bytes, path)

    def make_directory(self, path):
        self.around(super().make_directory, path)

    def sync(self, path):
        self.around(super().sync, path)

    def rename(self, source, target):
        self.around(super().rename, source, target)

    def write(self, path, chunks):
        def torn():
            for number, chunk in enumerate(chunks):
                yield chunk[: len(chunk) // 2]
                if number in (0, 2):  # a tensor's file begins with its header, in two chunks
                    self.step()  # the first half is with the operating system
                yield chunk[len(chunk) // 2 :]

        return self.around(super().write, path, torn())

    def remove(self, path):
        self.step()
        for shard in path.glob("shard_*") if path.is_dir() else ():  # a directory goes file by file
            shard.unlink()
            self.step()
        super().remove(path)
        self.step()


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def os_error_raiser(number):
    def fail():
        raise OSError(number, os.strerror(number), "the disk")

    return fail


def small_run(root, mesh=None, tp=1, watch=None, **checkpoint: Any):
    """Build as much of a `Run` as a Saver needs. `held`: its state, which a test may change.

    Args:
        root: the directory of checkpoints.
        mesh: of the run; by default of one rank.
        tp: ranks over which the state is split.
        watch: of the job.
        checkpoint: further settings of [checkpoint].
    """
    mesh = mesh or build_mesh(1, 1)
    job = Job(LaunchEnvironment(mesh.rank, mesh.world.size), torch.device("cpu"), None)
    job = Job(job.env, job.device, None, None, watch) if watch is not None else job
    held = build_state(tp, mesh.tp.rank)
    return SimpleNamespace(
        config=RunSettings(checkpoint=CheckpointConfig(save=str(root), **checkpoint)),
        job=job,
        mesh=mesh,
        state=SimpleNamespace(iteration=0),
        held=held,
        parts=lambda optimizer: held if optimizer else {"model": held["model"]},
    )


def build_saver(run, storage=None, said=None) -> Saver:
    """Build the saver of a run.

    Args:
        run: as `small_run` builds it.
        storage: the disk.
        said: a list that takes the lines that the saver prints.
    """
    return Saver(run, ASSETS, (said if said is not None else []).append, storage)


def save_at(run, saver: Saver, iteration: int) -> Path:
    """Save once, and return the directory.

    Args:
        run: its iteration is set.
        saver: of the run.
        iteration: of the checkpoint.
    """
    run.state.iteration = iteration
    saver.save()
    saver.finish()
    return Path(run.config.checkpoint.save) / f"iter_{iteration:07d}"


def save_once(root, iteration, storage=None, **checkpoint) -> Path:
    """Save once with a saver of its own, as a process does that has just started.

    Args:
        root: the directory of checkpoints.
        iteration: of the checkpoint.
        storage: the disk.
        checkpoint: further settings of [checkpoint].
    """
    run = small_run(root, **checkpoint)
    return save_at(run, build_saver(run, storage), iteration)


def count_steps(root, iteration, **checkpoint) -> int:
    """Count the steps at which a save can fail."""
    storage = FaultyStorage()
    save_once(root, iteration, storage, **checkpoint)
    return storage.steps


def run_in_forks(ranks, work, *args):
    """Run `work(rank, *args)` in forks, which saves importing torch; return their exit statuses, negative for signals."""
    pids = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(rank, *args)
                status = 0
            finally:
                os._exit(status)  # whatever happened, no test goes on in here
        pids.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
