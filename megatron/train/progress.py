"""Progress of the slices of a run: a small file beside its checkpoints, and the end of a slice before its first step. Pure.

A run on a cluster is a row of slices, each going on where the one before was stopped. A slot too short for start-up and one
step would be requeued for ever; two such slices in a row are an error.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron.files.pending import write_whole
from megatron.files.regular import read_json
from megatron.files.side import warning_on_error
from megatron.launch.exit_report import write_error_file, write_stderr

PROGRESS_FILE = "progress.json"
STOPPED = 75
MAX_IDLE_SLICES = 2  # slices in a row without a step


class Progress:
    """Contents of `progress.json` in --save when this slice began. Without --save nothing is known, and nothing is kept.

    Attributes:
        finished: the iteration at which the whole run ended, its last evaluations included; None before that.
        idle: slices in a row, the last one before this among them, that were stopped before they had made a step.
        job: the launcher's name for the job that began the last slice.
        tracker: the iteration that was announced as the latest then.
        stopped: that slice was ended on request.
    """

    def __init__(self, save: str | None) -> None:
        self._path = None if save is None else Path(save) / PROGRESS_FILE
        self.finished: int | None = None
        self.idle = 0
        self.job: str | None = None
        self.tracker: int | None = None
        self.stopped = False
        values: Any = None
        if self._path is not None:
            with suppress(OSError, ValueError):
                values = read_json(self._path)
        if isinstance(values, dict):
            finished, idle = values.get("finished"), values.get("slices_without_a_step")
            self.finished = finished if type(finished) is int else None
            self.idle = idle if type(idle) is int and idle > 0 else 0
            job, tracker = values.get("job"), values.get("checkpoint_at_start")
            self.job = job if isinstance(job, str) else None
            self.tracker = tracker if type(tracker) is int else None
            self.stopped = values.get("stopped_on_request") is True

    def too_short(self, why: str) -> str | None:
        """Return the message for a slice that ends now without a step; None while that is no error."""
        if self._path is None or self.idle + 1 < MAX_IDLE_SLICES:
            return None
        return (
            f"{self.idle + 1} slices in a row ended without a single step ({why}): the slot is too short for the start and one "
            f"step; give the run more time, and delete {self._path}, which keeps the count"
        )

    # What the first rank writes. Nothing depends on it but these two answers, so a full disk is not an error here.

    def write(self, *, finished: int | None = None, idle: int = 0, stopped: bool = False) -> None:
        """Write how far the job is. idle: starts one after another that made no step. stopped: it ended on request."""
        if self._path is None:
            return
        values: dict[str, Any] = {"finished": finished, "slices_without_a_step": idle, "stopped_on_request": stopped}
        values |= {"job": self.job, "checkpoint_at_start": self.tracker}
        with warning_on_error(self._path, "the run's slices cannot be noted"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(values) + "\n")

    def began(self, job: str | None, tracker: int | None, attempt: int) -> None:
        """Note that a slice goes on with the run, which is not finished. Only the job's first attempt notes what it found.

        Args:
            job: the launcher's name for the job.
            tracker: the iteration that --save announces as its latest.
            attempt: number of restarts by torchrun.
        """
        if attempt == 0 or job != self.job:
            self.job, self.tracker = job, tracker
            self.write(idle=self.idle)
        elif self.finished is not None:
            self.write(idle=self.idle)

    def moved(self) -> None:
        """Note that the slice has made its first step."""
        if self.idle:
            self.write()
            self.idle = 0


class EarlyStop:
    """The end of a slice that is told to stop before the ranks have joined: there is nothing to save yet.

    Attributes:
        progress: set as soon as the command has been read.
        again: advice for going on with a run that has saved; set then, too.
        before: what the end comes before, in words.
        reading: this is not the first rank, torchrun has started it, and it still reads the command: what ends it is mostly
            what the first one has found there, and torchrun reports whoever does not end with 0.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.progress = Progress(None)
        self.again, self.before = "start again to go on", "the first step"
        self.reading = False

    def __call__(self, name: str, rank: int) -> tuple[str, int]:
        """Return the message and the exit status. One rank calls it for all, or each for itself.

        Args:
            name: of the signal.
            rank: the one that got it.
        """
        why = f"{name} to rank {rank}"
        by_hand = name == "SIGINT"  # Ctrl-C tells nothing of the slot
        wrong = None if by_hand else self.progress.too_short(f"{why} before it")
        self.progress.write(finished=self.progress.finished, idle=self.progress.idle + (not by_hand))
        if wrong is not None:
            return f"error: {wrong}\n", 1
        return f"stopping before {self.before}: {why}; there is nothing to save; start again to go on\n", STOPPED

    def at_once(self, name: str) -> None:
        """End this process, which no other watches yet. The first rank speaks, for they are mostly all told to stop."""
        if self.reading and name == "SIGTERM":
            os._exit(0)
        text, status = self(name, self._rank)
        if self._rank == 0:
            write_stderr(text)
        write_error_file(text)
        os._exit(status)
