"""One rank of a job that imitates a pipeline, for `test_failures.py`: tensors go down the ranks, and something goes wrong.

Usage: torchrun watched_job.py FAULT DIRECTORY, or without torchrun: then it starts the ranks itself as srun would, and prints
their exit statuses. Rank 1 has the fault in its fifth step, in the forward of micro-batch 3. The directory gets each rank's
process number, and a file `ready` when rank 1 is there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron.launch.device import Hardware
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.heartbeat import WatchdogTimeouts
from megatron.launch.job import job

# Small limits; what is tested is which one counts, and that nothing else takes long.
QUICK = WatchdogTimeouts(period=0.2, silent=3.0, hang=5.0, settle=2.0)
STEPS, MICRO_BATCHES = 8, 4


class ExplainedError(Exception):
    """An error that needs no traceback."""


def do_fault(fault: str, env: LaunchEnvironment, marks: Path) -> None:
    """Do the fault that was asked for, on rank 1, or on all ranks.

    Args:
        fault: its name.
        env: of this rank.
        marks: a directory for a file that says that the rank is ready for signals.
    """
    if fault == "all-raise":
        time.sleep(1.0 - time.time() % 1.0)  # all at the same moment
        raise ExplainedError("in words")
    if env.rank != 1:
        return
    (marks / "ready").touch()
    if fault == "raise":
        raise ValueError("boom\non two lines")
    if fault == "known":
        raise ExplainedError("in words")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault in ("sleep", "in-collective", "outside"):
        time.sleep(1000.0)
    if fault == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000.0)
    if fault == "exit":
        sys.exit(7)
    if fault == "interrupt":
        raise KeyboardInterrupt
    if fault == "restart" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("only once")


def step(started, number: int, fault: str, marks: Path) -> None:
    """Pass each micro-batch from rank to rank; with some faults all are one stage that sums over its ranks.

    Args:
        started: the job.
        number: of the step.
        fault: done in the fourth step.
        marks: a directory for files about the ranks.
    """
    watch, env, x = started.watch, started.env, torch.zeros(16)
    one_stage = fault in ("in-collective", "all-raise")
    for micro_batch in range(MICRO_BATCHES):
        words = f"stage {env.rank}, forward of micro-batch {micro_batch}"
        if env.rank > 0 and not one_stage:
            watch.waiting(f"waiting for {words}")
            dist.recv(x, env.rank - 1)
        watch.computing("F", lambda words=words: words)
        time.sleep(0.01)
        if (number, micro_batch) == (4, 3):
            do_fault(fault, env, marks)
        if one_stage:
            dist.all_reduce(x)
        elif env.rank + 1 < env.world_size:
            watch.waiting(f"sending {words}")
            dist.send(x, env.rank + 1)
    watch.waiting("the end of the step")
    dist.all_reduce(x)
    watch.idle()


def explain(error: BaseException, where: str) -> str | None:
    return f"{where}: {error}" if isinstance(error, ExplainedError) else None


def fork_ranks(ranks: int, fault: str, marks: Path) -> int:
    """Fork the ranks as srun starts them, and wait for them; forks save importing torch in each.

    Args:
        ranks: number of ranks.
        fault: its name.
        marks: a directory for files about the ranks.
    """
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_PROCID": str(rank)}
            os.environ["SLURM_STEP_TASKS_PER_NODE"] = str(ranks)
            return main(fault, marks)
        pids.append(pid)
    print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    return 0


def main(fault: str, marks: Path) -> int:
    env = LaunchEnvironment.from_environ(os.environ)
    (marks / f"pid{env.rank}").write_text(str(os.getpid()))
    timeouts = None if fault == "sleep" else QUICK
    # Of these hosts, rank 1's has a driver that is dead.
    found = Hardware(0, "its driver is dead") if env.rank == 1 else Hardware(4)
    look = (lambda: found) if fault == "dead-driver" else Hardware.detect
    with job(env, None if look() is found else "gloo", explain=explain, timeouts=timeouts, detect=look) as started:
        for number in range(STEPS):
            step(started, number, fault, marks)
        if fault == "late" and env.rank == 1:
            started.watch.doing("something slow at the end")
            time.sleep(4.0)
    return 0


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    sys.exit(main(what, where) if "RANK" in os.environ else fork_ranks(3, what, where))
