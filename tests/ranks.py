"""Run a function on several gloo processes that stay alive across tests.

    results = on_ranks(4, function, *args)      # results[r] = function(*args) on rank r

`function` is looked up by module and name in each process, so it must stand at the top of a module. Inside it,
torch.distributed is initialised with that many ranks and one thread each. The first failure is raised here, with its rank
and traceback; a failed pool is thrown away, since its ranks may wait in a collective for ever.

A rank is this file as a program, whose standard input is the connection to the tests; `warm.py` forks it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from messages import send

TIMEOUT_S = 240.0


def _serve(rank: int, pipe: Connection) -> None:
    """Run the functions that come through the pipe, as one rank of a process group, until the pipe ends."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            task = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if task is None:
            dist.destroy_process_group()
            return
        function, args = task
        try:
            send(pipe, (True, function(*args)))
        except BaseException as error:  # whatever it is, the test must see it
            send(pipe, (False, f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a program that ran here may have left it ignored, and then none ends
        # Every group has threads that wake up a hundred times a second; hundreds of old ones would take the whole machine.
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        gc.collect()


class Pool:
    """Processes in one gloo process group, `world` of them."""

    def __init__(self, world: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pipes, self.processes = [], []
        path = json.dumps([str(Path(__file__).parent), *sys.path])
        for rank in range(world):
            ours, theirs = socket.socketpair()
            place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"}
            with theirs:
                process = subprocess.Popen([os.environ["WARM_PYTHON"], __file__, path], stdin=theirs, env=environment)
            self.pipes.append(Connection(ours.detach()))
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        """Run `function(*args)` on every rank, and return the results by rank."""
        for pipe in self.pipes:
            send(pipe, (function, args))
        deadline = time.monotonic() + TIMEOUT_S
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            silent = [rank for rank in range(len(self.pipes)) if rank not in results]
            ready = wait([self.pipes[rank] for rank in silent], max(0.0, deadline - time.monotonic()))
            for rank in silent:
                if self.pipes[rank] not in ready:
                    continue
                try:
                    ok, value = self.pipes[rank].recv()
                except EOFError:
                    ok, value = False, f"rank {rank}: the process died"
                if not ok:
                    self.kill()
                    raise AssertionError(value)
                results[rank] = value
            if not ready:
                self.kill()
                raise AssertionError(f"ranks {silent} gave no answer in {TIMEOUT_S} s")
        return [results[r] for r in range(len(self.pipes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End the ranks; those that do not end in time are killed."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        self.kill()


class Pools:
    """The living pools, one for each world size."""

    def __init__(self) -> None:
        self.live: dict[int, Pool] = {}
        atexit.register(self.close)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*args)` on each of `world` ranks.

        Args:
            world: number of ranks.
            function: from the top of a module; torch.distributed is initialised when it is called.
            args: its arguments, which are pickled, as is its result.

        Returns:
            The results by rank.

        Raises:
            AssertionError: a rank failed, died or gave no answer in time.
        """
        pool = self.live.get(world) or Pool(world)
        self.live[world] = pool
        try:
            return pool.run(function, args)
        except BaseException:
            self.live.pop(world, None)
            pool.kill()
            raise

    def close(self) -> None:
        for pool in self.live.values():
            pool.close()
        self.live.clear()


on_ranks = Pools().run

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    tasks = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _serve(int(os.environ["RANK"]), tasks)
