"""Reconstruct the command that started this process, and the one that starts it on several, as a user types them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron.launch.environment import LaunchEnvironment


def typed_command(program: str, argv: Sequence[str], env: LaunchEnvironment) -> list[str]:
    """Return the command that started this process as the user typed it, including the launcher.

    Args:
        program: name of the entry script, for a command that cannot be determined.
        argv: its arguments.
        env: the launcher's environment of this process.

    Returns:
        The words of the command; `[program, *argv]` if it cannot be determined.
    """
    seen = list(sys.orig_argv)
    # torchrun is the parent process of its ranks, and /proc holds its words, each terminated by a null byte.
    if env.launcher == "torchrun":
        with suppress(OSError):
            seen = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    elif env.launcher == "srun":
        seen = ["srun", *seen]
    # Another program, such as a test, may have called `main` with its own arguments.
    ours = bool(argv) and len(seen) > len(argv) and seen[-len(argv) :] == list(argv)
    return seen if ours else [program, *argv]


def torchrun_command(processes: int, program: str, argv: Sequence[str]) -> list[str]:
    """Return the torchrun command that starts this program, which plain python has started, on several processes.

    Args:
        processes: number of processes to start.
        program: name of the entry script, for a command that cannot be determined.
        argv: its arguments.

    Returns:
        The words of the command.
    """
    seen = list(sys.orig_argv)
    at = len(seen) - len(argv) - 1
    if at < 1 or seen[at + 1 :] != list(argv):
        return ["torchrun", "--nproc_per_node", str(processes), program, *argv]
    # `python -m package.program`: torchrun takes -m as well.
    module = ["-m"] if seen[at - 1] == "-m" else []
    # In an environment that is not active, torchrun lies beside the Python that was named with its path.
    named = "/" in seen[0]
    beside = Path(seen[0]).with_name("torchrun") if named else Path("torchrun")
    there = beside.exists() if named else shutil.which(beside) is not None
    launcher = [str(beside)] if there else [seen[0], "-m", "torch.distributed.run"]
    return [*launcher, "--nproc_per_node", str(processes), *module, *seen[at:]]
