"""Answer Ctrl-C during a run, and give the command that resumes a stopped run. Imports no torch.

torchrun forwards the first Ctrl-C to its processes as SIGINT and kills them half a minute later; at the second Ctrl-C it sends
them SIGTERM. Under plain python the processes receive each Ctrl-C themselves.
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

INTERRUPTED = 130  # exit status after a second Ctrl-C: 128 + SIGINT, as shells report it


def resume_advice(command: Sequence[str], checkpoint: CheckpointConfig) -> str:
    """Return how to resume a run that has saved: by the same command with --auto-resume and without --overwrite."""
    if checkpoint.auto_resume:
        return "start again to go on"
    words = [word for word in command if word.replace("_", "-") != "--overwrite"]
    in_file = (
        " and without its overwrite in the file of --config" if checkpoint.overwrite and len(words) == len(command) else ""
    )
    return f"start again with --auto-resume{in_file} to go on: {shlex.join([*words, '--auto-resume'])}"


class RunInterruptHandler(InterruptHandler):
    """Answers Ctrl-C for a run. Every rank receives it, but only rank 0 prints.

    Attributes:
        checkpoint: the checkpoint settings; the defaults until the command line has been read.
        command: the command as the user typed it; empty until then.
    """

    def __init__(self, env: LaunchEnvironment) -> None:
        self._is_rank_0, self.launcher_forwards = env.rank == 0, env.launcher == "torchrun"
        self.echo_seconds = 0.5 if env.world_size > 1 else 0.0
        self.checkpoint = CheckpointConfig()
        self.command: Sequence[str] = ()

    def on_first_interrupt(self) -> None:
        """Print that the run stops with a checkpoint, if it has a --save, and how long its launcher waits for that."""
        if self._is_rank_0:
            action = "saving a checkpoint" if self.checkpoint.save is not None else "without --save nothing is saved"
            limit = "; torchrun kills a process that has not ended in half a minute" if self.launcher_forwards else ""
            write_stderr(f"Ctrl-C: stopping at the end of this step, {action}{limit}; a second Ctrl-C ends at once\n")

    def on_second_interrupt(self, name: str) -> None:
        """End this process, and print which checkpoint remains."""
        text = f"ended at once by a second Ctrl-C ({name}); {self._describe_remaining()}\n"
        if self._is_rank_0:
            write_stderr(text)
        write_error_file(text)
        os._exit(INTERRUPTED)

    def _describe_remaining(self) -> str:
        """Return which checkpoint remains after an immediate end, and how to resume from it."""
        if self.checkpoint.save is None:
            return "nothing is saved, because there is no --save"
        from megatron.checkpoint.layout import CheckpointError, read_tracker

        with suppress(CheckpointError):
            newest = read_tracker(Path(self.checkpoint.save))
            if newest is not None:
                advice = resume_advice(self.command, self.checkpoint)
                return f"{self.checkpoint.save} contains the checkpoint of iteration {newest}; {advice}"
        return f"nothing is saved: no checkpoint was finished in {self.checkpoint.save}"
