"""Starts pretraining commands on several ranks, each in a second, for tests of how runs end.

Torch is imported once, ranks are forked from there.
Reads one JSON object a line: argv, ranks, launcher, out, err, env, fault (rank, phase, at, how; or null).
The fault is done at the `at`-th time that rank comes to the phase. launcher: like torchrun, SIGTERM goes to all ranks when one
has ended with another status than 0. Answers with the exit statuses of the ranks, by a line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from warm import leave, run_to_exit_status

from megatron.cli import program
from megatron.optim.optimizer import Optimizer
from megatron.pipeline.executor import Executor
from megatron.train import pretraining, saving
from megatron.train.stopping import Stopping

PHASES = {
    "arg check": (program, "parse"),
    "dataset build": (pretraining, "build_datasets"),
    "model build": (pretraining, "build_run"),
    "restore": (pretraining, "restore"),
    "forward": (Executor, "_forward"),
    "backward": (Executor, "_backward"),
    "optimizer": (Optimizer, "step"),
    "save": (saving, "write_checkpoint"),
    "eval": (Executor, "evaluate"),
    "boundary": (Stopping, "ask"),
}


def do_fault(how: str) -> None:
    """Sleep, raise, exit or send this process signals, as `how` says."""
    if how == "exception":
        raise ValueError("made to fail")
    if how == "exit":
        os._exit(9)
    for what in how.split("+"):
        if what == "sleep":
            time.sleep(4.0)
        else:
            os.kill(os.getpid(), signal.Signals[what])


def arm_fault(fault) -> None:
    """Let a fault happen the `at`-th time that this rank comes to its phase."""
    owner, name = PHASES[fault["phase"]]
    plain, calls = getattr(owner, name), []

    def wrapped(*args, **keywords):
        calls.append(name)
        if len(calls) == fault["at"]:
            if name == "build_datasets":  # which no rank waits for: the others may not watch this one yet
                time.sleep(1.0)
            do_fault(fault["how"])
        return plain(*args, **keywords)

    setattr(owner, name, wrapped)


def become_rank(job, rank: int, port: int) -> NoReturn:
    """Be this rank: run the command, and end with its status.

    Args:
        job: the request, see above.
        rank: of this process.
        port: of the ranks' store, on this host.
    """
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    ranks = str(job["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | job.get("env", {})
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{job['err']}.{rank}.json"
    if job["ranks"] == 1 and "RANK" not in job.get("env", {}):  # as plain python starts it
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    if job["fault"] and job["fault"]["rank"] == rank:
        arm_fault(job["fault"])
    sys.exit(program.pretrain(job["argv"], program="pretrain_gpt.py", defaults={}))


def stop(pids, number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def run(job) -> dict[str, object]:
    """Fork the ranks of a job, and return how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            leave(run_to_exit_status(partial(become_rank, job, rank, port)))
        pids.append(pid)
    began, statuses, told = time.monotonic(), {}, False
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(status)
        left = [pid for pid in pids if pid not in statuses]
        if time.monotonic() - began > 60.0:
            stop(left, signal.SIGKILL)
        elif job["launcher"] and not told and any(statuses.values()):
            told = True
            stop(left, signal.SIGTERM)
        time.sleep(0.01)
    return {"statuses": [statuses[pid] for pid in pids], "seconds": time.monotonic() - began}


if __name__ == "__main__":
    gc.freeze()  # or each rank's first collection copies all that it was forked with
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
