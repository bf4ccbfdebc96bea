"""How a run that ends before its end is gone on with: the command, and what Ctrl-C says. Imports no torch.

torchrun passes the first Ctrl-C on to its processes as SIGINT, kills them half a minute later, and ends them with SIGTERM at
the second. Under plain python the processes get each Ctrl-C themselves.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron.config.schema import CheckpointConfig
from megatron.mesh.last_words import say, tell_launcher
from megatron.mesh.place import Place
from megatron.mesh.signals import Interrupts

INTERRUPTED = 130  # the exit status of what a second Ctrl-C ends, as shells have it


def typed_command(program: str, argv: Sequence[str], place: Place) -> list[str]:
    """The words that started this process as a user typed them, launcher and all, as far as that can be seen.

    Args:
        program: name of the entry script, for a command that cannot be seen.
        argv: its arguments.
        place: of this process; says who started it.
    """
    seen = list(sys.orig_argv)
    if place.source == "torchrun":
        with suppress(OSError):
            seen = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    elif place.source == "srun":
        seen = ["srun", *seen]
    ours = bool(argv) and len(seen) > len(argv) and seen[-len(argv) :] == list(argv)
    return seen if ours else [program, *argv]


def with_torchrun(processes: int, program: str, argv: Sequence[str]) -> list[str]:
    """The words that start the same program on several processes, where it was started by plain python.

    Args:
        processes: how many.
        program: its name, where how it was started cannot be seen.
        argv: its arguments.
    """
    seen = list(sys.orig_argv)
    at = len(seen) - len(argv) - 1
    if at < 1 or seen[at + 1 :] != list(argv):
        return ["torchrun", "--nproc_per_node", str(processes), program, *argv]
    module = ["-m"] if seen[at - 1] == "-m" else []
    # Where its environment is not active, torchrun lies beside the Python that was named.
    named = "/" in seen[0]
    beside = Path(seen[0]).with_name("torchrun") if named else Path("torchrun")
    there = beside.exists() if named else shutil.which(beside) is not None
    launcher = [str(beside)] if there else [seen[0], "-m", "torch.distributed.run"]
    return [*launcher, "--nproc_per_node", str(processes), *module, *seen[at:]]


def how_to_go_on(command: Sequence[str], checkpoint: CheckpointConfig) -> str:
    """How a run that has saved goes on, in words: by the same command, which needs --auto-resume, and no --overwrite."""
    if checkpoint.auto_resume:
        return "start again to go on"
    kept = [word for word in command if word.replace("_", "-") != "--overwrite"]
    file = " and without its overwrite in the file of --config" if checkpoint.overwrite and len(kept) == len(command) else ""
    return f"start again with --auto-resume{file} to go on: {shlex.join([*kept, '--auto-resume'])}"


class CtrlC(Interrupts):
    """Answers Ctrl-C for a run. The first rank speaks, since all of them hear it.

    checkpoint, command: set as soon as the command has been read; `typed_command`.
    """

    def __init__(self, place: Place) -> None:
        self._first, self.relayed = place.rank == 0, place.source == "torchrun"
        self.echo = 0.5 if place.world_size > 1 else 0.0
        self.checkpoint = CheckpointConfig()
        self.command: Sequence[str] = ()

    def first(self) -> None:
        """Say that the run saves, and for how long its launcher waits."""
        if self._first:
            what = "saving a checkpoint" if self.checkpoint.save is not None else "without --save nothing is kept"
            limit = "; torchrun kills what is not done in half a minute" if self.relayed else ""
            say(f"Ctrl-C: stopping at the end of this step, {what}{limit}; a second Ctrl-C ends at once\n")

    def again(self, name: str) -> None:
        """End this process, and say what is kept."""
        text = f"ended at once by a second Ctrl-C ({name}); {self._kept()}\n"
        if self._first:
            say(text)
        tell_launcher(text)
        os._exit(INTERRUPTED)

    def _kept(self) -> str:
        if self.checkpoint.save is None:
            return "nothing is kept, because there is no --save"
        from megatron.checkpoint.layout import CheckpointError, read_tracker

        with suppress(CheckpointError):
            newest = read_tracker(Path(self.checkpoint.save))
            if newest is not None:
                then = how_to_go_on(self.command, self.checkpoint)
                return f"{self.checkpoint.save} keeps the checkpoint of iteration {newest}; {then}"
        return f"nothing is kept: no checkpoint was finished in {self.checkpoint.save}"
