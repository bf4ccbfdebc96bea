"""Record the progress of a run's slices in a file beside its checkpoints; end a slice that is stopped before its first step.

On a cluster with a time limit, a run is a sequence of slices: batch jobs, each of which resumes where the previous one stopped.
If the time limit were too short for the start and one step, the run would be requeued for ever without any progress. So two
slices in a row without a step are an error.
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
STOPPED = 75  # `ending.Exit.STOPPED`, which cannot be imported here: its module imports torch
MAX_IDLE_SLICES = 2  # slices in a row without a step


class Progress:
    """Content of `progress.json` in --save, as read at the start of this slice. Without --save, nothing is read or written.

    Attributes:
        finished: the iteration at which the run finished, final evaluations included; None before that.
        idle: number of slices in a row, this one not included, that were stopped before their first step.
        job: the launcher's id of the job of the previous slice.
        tracker: the iteration in the tracker file of --save when that slice began.
        stopped: that slice was stopped on request.
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
            # Types are compared exactly, since bool is a subclass of int.
            finished, idle = values.get("finished"), values.get("slices_without_a_step")
            self.finished = finished if type(finished) is int else None
            self.idle = idle if type(idle) is int and idle > 0 else 0
            job, tracker = values.get("job"), values.get("checkpoint_at_start")
            self.job = job if isinstance(job, str) else None
            self.tracker = tracker if type(tracker) is int else None
            self.stopped = values.get("stopped_on_request") is True

    def idle_error(self, why: str) -> str | None:
        """Return the error message for a slice without a step, if the previous one made none either; None otherwise.

        Args:
            why: the reason for the stop.
        """
        if self._path is None or self.idle + 1 < MAX_IDLE_SLICES:
            return None
        return (
            f"{self.idle + 1} slices in a row ended without a step ({why}): the time limit is too short for the start and one "
            f"step; give the run more time, and delete {self._path}, which contains the count"
        )

    # Only the first rank writes. A disk error only warns, since a run can do without the file.

    def write(self, *, finished: int | None = None, idle: int = 0, stopped: bool = False) -> None:
        """Write `progress.json`.

        Args:
            finished: the iteration at which the whole run ended; None if it has not ended.
            idle: number of slices in a row, up to this one, that made no step.
            stopped: this slice was stopped on request.
        """
        if self._path is None:
            return
        values: dict[str, Any] = {"finished": finished, "slices_without_a_step": idle, "stopped_on_request": stopped}
        values |= {"job": self.job, "checkpoint_at_start": self.tracker}
        with warning_on_error(self._path, "the progress of the run cannot be recorded"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(values) + "\n")

    def note_start(self, job: str | None, tracker: int | None, attempt: int) -> None:
        """Record the start of a slice. A restart by torchrun within a job keeps `job` and `tracker` of the first start.

        Args:
            job: the launcher's id of the job.
            tracker: the iteration in the tracker file of --save.
            attempt: number of restarts by torchrun so far.
        """
        if attempt == 0 or job != self.job:
            self.job, self.tracker = job, tracker
            self.write(idle=self.idle)
        elif self.finished is not None:
            self.write(idle=self.idle)

    def note_first_step(self) -> None:
        """Record that the slice has made its first step."""
        if self.idle:
            self.write()
            self.idle = 0


class EarlyStop:
    """Ends a slice that is asked to stop before its training loop has started, when there is nothing to save yet.

    Attributes:
        progress: the record of the run's slices; set when the command has been read.
        resume_advice: how to resume a run that has saved; set when the command has been read.
        before: the event before which the slice stops, for the message.
        reading: torchrun started this process, which is not rank 0, and it is still reading the command. A SIGTERM then usually
            means that rank 0 has found a mistake in the command, so the process exits with 0: torchrun would report another.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.progress = Progress(None)
        self.resume_advice, self.before = "start again to go on", "the first step"
        self.reading = False

    def __call__(self, name: str, rank: int) -> tuple[str, int]:
        """Record the stop, and return the message and the exit status. One rank calls this for all, or each rank for itself.

        Args:
            name: name of the signal, `SIGTERM`.
            rank: the rank that received it.
        """
        why = f"{name} to rank {rank}"
        is_ctrl_c = name == "SIGINT"  # which does not mean that the time limit is too short
        error = None if is_ctrl_c else self.progress.idle_error(f"{why} before it")
        self.progress.write(finished=self.progress.finished, idle=self.progress.idle + (not is_ctrl_c))
        if error is not None:
            return f"error: {error}\n", 1
        return f"stopping before {self.before}: {why}; there is nothing to save; start again to go on\n", STOPPED

    def exit_process(self, name: str) -> None:
        """End this process before it has a watchdog. Only rank 0 prints, since a signal usually reaches all ranks."""
        if self.reading and name == "SIGTERM":
            os._exit(0)
        text, status = self(name, self._rank)
        if self._rank == 0:
            write_stderr(text)
        write_error_file(text)
        os._exit(status)
