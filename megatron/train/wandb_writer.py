"""Write to Weights & Biases for a run, in a process of its own: `python -m megatron.train.wandb_writer`, a socket as stdin.

A run must neither wait for W&B nor fail with it. But W&B blocks for minutes when the network is down, and for an upload at the
end of the interpreter. It also replaces sys.exit and asks for keys on a terminal. So it runs in a separate process, which
receives a line of JSON for each point. If the run is killed, this process survives it and marks it as failed in W&B.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.files.regular import parse_json
from megatron.train.wandb_run import WandbRun, read_wandb_run

EXIT_CODES = {"finished": 0, "failed": 1, "preempted": 75}  # the exit statuses of the pretraining programs
LOCK_SECONDS = 30.0  # how long this process waits for that of the previous slice
MAX_SECONDS_AFTER_RUN = 600  # time for the upload after the run has ended
OFFLINE_MODES = ("offline", "dryrun", "disabled")

Reply = Callable[[Mapping[str, Any]], None]


def receive(channel: socket.socket) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of the run until it ends, each time a list of those that have arrived."""
    incomplete = b""  # start of a message
    while True:
        try:
            data = channel.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            return
        *lines, incomplete = (incomplete + data).split(b"\n")
        if lines:
            yield [parse_json(line) for line in lines]


def open_wandb_run(setup: Mapping[str, Any], reply: Reply) -> Any:
    """Open the W&B run, or without a network an offline run, which stores its points on disk. Raises any exception of W&B."""
    import wandb

    # With resume="allow", W&B continues the run of this id if there is one, and creates it otherwise.
    arguments = {name: value for name, value in setup["init"].items() if value is not None}
    try:
        return wandb.init(**arguments, resume="allow", settings={"console": "off"})
    except Exception as error:
        if os.environ.get("WANDB_MODE") in OFFLINE_MODES:
            raise
        consequence = f"points are stored below {arguments['dir']}, and `wandb sync` sends them"
        reply({"failed": "cannot be reached", "error": error_text(error), "then": consequence})
        return wandb.init(**arguments, resume="allow", settings={"console": "off"}, mode="offline")


class Writer:
    """Logs points to a W&B run, each once, and records the newest."""

    def __init__(self, setup: Mapping[str, Any], run: Any, reply: Reply) -> None:
        self._run, self._reply, self._reported_failures = run, reply, set[str]()
        self._path = Path(setup["record"]) if setup["record"] else None
        recorded, chosen = read_wandb_run(self._path), WandbRun(**setup["run"])
        # The process of the previous slice may have logged more points since this slice read the record.
        self.record = replace(recorded, settings=chosen.settings) if recorded.id == chosen.id else chosen
        self._first_iteration = self.record.iteration

    def log_points(self, messages: list[dict[str, Any]]) -> str | None:
        """Log the new points. Return the outcome of the run if one of the messages contains it."""
        outcome = None
        for message in messages:
            if "ended" in message:
                outcome = str(message["ended"])
                continue
            step, split = message["step"], message["split"]
            newest = self.record.iteration if split is None else self.record.evaluations.get(split, -1)
            if step <= newest:
                continue
            # W&B refuses points of steps that an earlier slice has logged, so a late point is logged at the next step.
            with self._suppressing_errors("points cannot be logged"):
                # NaN and infinity arrive as text, since JSON has neither.
                values = {tag: float(v) if isinstance(v, str) else v for tag, v in message["values"].items()}
                self._run.log(values, step=max(step, self._first_iteration + 1))
            if split is None:
                self.record = replace(self.record, iteration=step)
            else:
                self.record = replace(self.record, evaluations={**self.record.evaluations, split: step})
        self.write_record()
        return outcome

    def write_record(self) -> None:
        """Write the record of the newest points to its file beside the checkpoints."""
        if self._path is not None:
            with self._suppressing_errors(f"{self._path} cannot be written"):
                self.record.write(self._path)

    def finish(self, outcome: str) -> None:
        """Report the outcome of the run to W&B, and wait until everything is uploaded."""
        with self._suppressing_errors("the run cannot be finished"):
            if outcome == "preempted":
                self._run.mark_preempting()
        with self._suppressing_errors("the run cannot be finished"):
            self._run.finish(exit_code=EXIT_CODES[outcome])

    def _suppressing_errors(self, what: str) -> _ErrorSuppressor:
        return _ErrorSuppressor(what, self._reported_failures, self._reply)


class _ErrorSuppressor:
    """Suppresses any exception inside the block, and reports each kind of failure once."""

    def __init__(self, what: str, reported: set[str], reply: Reply) -> None:
        self._what, self._reported, self._reply = what, reported, reply

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None and self._what not in self._reported:
            self._reported.add(self._what)
            self._reply({"failed": self._what, "error": error_text(error), "then": "the run goes on"})
        return True


def error_text(error: BaseException) -> str:
    """Return the class and the message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def wait_for_previous_slice(directory: Path) -> None:
    """Lock the W&B directory, where the process of the previous slice may still write. Go on without a lock if flock fails."""
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, deadline = os.open(directory, os.O_RDONLY), time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                return  # held until this process ends


def serve_run(channel: socket.socket) -> None:
    """Log the points of a run until its end, then finish the W&B run."""

    def reply(values: Mapping[str, Any]) -> None:
        with suppress(OSError):  # the run has ended
            channel.sendall(json.dumps(values).encode() + b"\n")

    messages = receive(channel)
    first_messages = next(messages, None)
    if first_messages is None:
        return
    setup, *points = first_messages
    wait_for_previous_slice(Path(setup["init"]["dir"]))
    try:
        run = open_wandb_run(setup, reply)
    except BaseException as error:
        reply({"failed": "cannot be used", "error": error_text(error), "then": "the run goes on without it"})
        return
    reply({"info": f"W&B: run {setup['run']['id']}, {getattr(run, 'url', None) or 'below ' + setup['init']['dir']}"})
    writer = Writer(setup, run, reply)
    outcome = writer.log_points(points)
    for batch in messages:
        outcome = writer.log_points(batch) or outcome
    signal.alarm(MAX_SECONDS_AFTER_RUN)  # W&B may wait for the network for ever
    writer.finish(outcome or "failed")
    reply({"done": True})


def main() -> None:
    """Run the writer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the run answers these signals; when it ends, it closes the socket
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # otherwise W&B's own processes would inherit the socket as stdin and keep it open
    os.close(null)
    serve_run(channel)


if __name__ == "__main__":
    main()
