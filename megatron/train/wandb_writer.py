"""Process that writes to Weights & Biases for a run: `python -m megatron.train.wandb_writer`, with a socket as its stdin.

A run must neither wait for W&B nor fail with it. W&B blocks, however: minutes for a network that is down, and at the end of the
interpreter for an upload. It also replaces sys.exit and asks for keys on a terminal. So it runs in a process of its own, which
receives a line of JSON for each point. That process outlives a run that is killed, and then marks it as failed.
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
LOCK_SECONDS = 30.0  # how long the next slice waits for this process of the slice before
MAX_SECONDS_AFTER_RUN = 600
OFFLINE = ("offline", "dryrun", "disabled")

Reply = Callable[[Mapping[str, Any]], None]


def receive(channel: socket.socket) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of the run, all that have arrived at a time, until the run ends."""
    left = b""
    while True:
        try:
            data = channel.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            return
        *lines, left = (left + data).split(b"\n")  # the last piece is a message that has come in part
        if lines:
            yield [parse_json(line) for line in lines]


def open_wandb_run(setup: Mapping[str, Any], reply: Reply) -> Any:
    """Open the W&B run; without a network, an offline run whose points stay on the disk. Raises any exception of W&B."""
    import wandb

    # With resume="allow", W&B continues the run of this id if there is one, and creates it otherwise.
    wanted = {name: value for name, value in setup["init"].items() if value is not None}
    try:
        return wandb.init(**wanted, resume="allow", settings={"console": "off"})
    except Exception as error:
        if os.environ.get("WANDB_MODE") in OFFLINE:
            raise
        then = f"points are kept below {wanted['dir']}, and `wandb sync` sends them"
        reply({"failed": "cannot be reached", "error": error_text(error), "then": then})
        return wandb.init(**wanted, resume="allow", settings={"console": "off"}, mode="offline")


class Writer:
    """Logs points to a W&B run, each once, and records the newest."""

    def __init__(self, setup: Mapping[str, Any], run: Any, reply: Reply) -> None:
        self._run, self._reply, self._failing = run, reply, set[str]()
        self._path = Path(setup["record"]) if setup["record"] else None
        kept, wanted = read_wandb_run(self._path), WandbRun(**setup["run"])
        # The process of the slice before may have logged more since this slice read the record.
        self.record = replace(kept, settings=wanted.settings) if kept.id == wanted.id else wanted
        self._begun = self.record.iteration

    def log_points(self, messages: list[dict[str, Any]]) -> str | None:
        """Log the points that are new. Return how the run ended if one of the messages says so."""
        ended = None
        for message in messages:
            if "ended" in message:
                ended = str(message["ended"])
                continue
            step, split = message["step"], message["split"]
            newest = self.record.iteration if split is None else self.record.evaluations.get(split, -1)
            if step <= newest:
                continue
            # W&B refuses points of a step that an earlier slice has closed, so a late point goes to the next step.
            with self._surviving("points cannot be logged"):
                # NaN and infinity, which JSON does not have, are sent as text.
                values = {tag: float(v) if isinstance(v, str) else v for tag, v in message["values"].items()}
                self._run.log(values, step=max(step, self._begun + 1))
            if split is None:
                self.record = replace(self.record, iteration=step)
            else:
                self.record = replace(self.record, evaluations={**self.record.evaluations, split: step})
        self.write_record()
        return ended

    def write_record(self) -> None:
        """Write the newest points to the record beside the checkpoints."""
        if self._path is not None:
            with self._surviving(f"{self._path} cannot be written"):
                self.record.write(self._path)

    def finish(self, ended: str) -> None:
        """Report to W&B how the run ended, and wait until it has everything."""
        with self._surviving("the run cannot be finished"):
            if ended == "preempted":
                self._run.mark_preempting()
        with self._surviving("the run cannot be finished"):
            self._run.finish(exit_code=EXIT_CODES[ended])

    def _surviving(self, what: str) -> _Surviving:
        return _Surviving(what, self._failing, self._reply)


class _Surviving:
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
    """Lock the W&B directory, which the process of the slice before may still write to; do without where flock fails."""
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, until = os.open(directory, os.O_RDONLY), time.monotonic() + LOCK_SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                return  # held until this process ends


def serve_run(channel: socket.socket) -> None:
    """Handle the messages of a run, until its end."""

    def reply(values: Mapping[str, Any]) -> None:
        with suppress(OSError):  # the run has ended
            channel.sendall(json.dumps(values).encode() + b"\n")

    messages = receive(channel)
    first = next(messages, None)
    if first is None:
        return
    setup, *rest = first
    wait_for_previous_slice(Path(setup["init"]["dir"]))
    try:
        run = open_wandb_run(setup, reply)
    except BaseException as error:
        reply({"failed": "cannot be used", "error": error_text(error), "then": "the run goes on without it"})
        return
    reply({"info": f"W&B: run {setup['run']['id']}, {getattr(run, 'url', None) or 'below ' + setup['init']['dir']}"})
    writer = Writer(setup, run, reply)
    ended = writer.log_points(rest)
    for batch in messages:
        ended = writer.log_points(batch) or ended
    signal.alarm(MAX_SECONDS_AFTER_RUN)  # W&B may wait for a network for ever
    writer.finish(ended or "failed")
    reply({"done": True})


def main() -> None:
    """Run the writer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the run, whose end closes the socket
    channel = socket.socket(fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)  # W&B's own processes would inherit the socket as stdin and keep it open
    os.close(nowhere)
    serve_run(channel)


if __name__ == "__main__":
    main()
