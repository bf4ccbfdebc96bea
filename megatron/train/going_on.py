"""Tell the user how to go on with a run that was stopped: the command, and the answer to Ctrl-C. Imports no torch.

torchrun passes the first Ctrl-C on to its processes as SIGINT, kills them half a minute later, and ends them with SIGTERM at
the second. Under plain python the processes get each Ctrl-C themselves.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron.config.schema import CheckpointConfig
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.exit_report import write_error_file, write_stderr
from megatron.launch.signals import InterruptHandler

INTERRUPTED = 130  # the exit status of what a second Ctrl-C ends, as shells have it


def resume_advice(command: Sequence[str], checkpoint: CheckpointConfig) -> str:
    """Return the advice for going on with a run that has saved: the same command with --auto-resume, without --overwrite."""
    if checkpoint.auto_resume:
        return "start again to go on"
    kept = [word for word in command if word.replace("_", "-") != "--overwrite"]
    file = " and without its overwrite in the file of --config" if checkpoint.overwrite and len(kept) == len(command) else ""
    return f"start again with --auto-resume{file} to go on: {shlex.join([*kept, '--auto-resume'])}"


class CtrlC(InterruptHandler):
    """Answers Ctrl-C for a run. The first rank speaks, since all of them hear it.

    checkpoint, command: set as soon as the command has been read; `typed_command`.
    """

    def __init__(self, env: LaunchEnvironment) -> None:
        self._first, self.relayed = env.rank == 0, env.launcher == "torchrun"
        self.echo = 0.5 if env.world_size > 1 else 0.0
        self.checkpoint = CheckpointConfig()
        self.command: Sequence[str] = ()

    def first(self) -> None:
        """Say that the run saves, and for how long its launcher waits."""
        if self._first:
            what = "saving a checkpoint" if self.checkpoint.save is not None else "without --save nothing is kept"
            limit = "; torchrun kills what is not done in half a minute" if self.relayed else ""
            write_stderr(f"Ctrl-C: stopping at the end of this step, {what}{limit}; a second Ctrl-C ends at once\n")

    def again(self, name: str) -> None:
        """End this process, and say what is kept."""
        text = f"ended at once by a second Ctrl-C ({name}); {self._kept()}\n"
        if self._first:
            write_stderr(text)
        write_error_file(text)
        os._exit(INTERRUPTED)

    def _kept(self) -> str:
        if self.checkpoint.save is None:
            return "nothing is kept, because there is no --save"
        from megatron.checkpoint.layout import CheckpointError, read_tracker

        with suppress(CheckpointError):
            newest = read_tracker(Path(self.checkpoint.save))
            if newest is not None:
                then = resume_advice(self.command, self.checkpoint)
                return f"{self.checkpoint.save} keeps the checkpoint of iteration {newest}; {then}"
        return f"nothing is kept: no checkpoint was finished in {self.checkpoint.save}"
