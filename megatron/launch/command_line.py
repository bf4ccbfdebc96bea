"""Reconstruct the command that started this process as the user typed it, and the torchrun command for several processes."""

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
        program: name of the entry script, used if the command cannot be determined.
        argv: arguments of the entry script.
        env: the launch environment of this process.

    Returns:
        The words of the command; `[program, *argv]` if it cannot be determined.
    """
    command = list(sys.orig_argv)
    # torchrun is the parent process of its ranks; /proc shows its command line, each argument followed by a null byte.
    if env.launcher == "torchrun":
        with suppress(OSError):
            command = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")[:-1]
    elif env.launcher == "srun":
        command = ["srun", *command]
    # Another program, such as a test, may have called `main` with arguments that were not on its own command line.
    is_ours = bool(argv) and len(command) > len(argv) and command[-len(argv) :] == list(argv)
    return command if is_ours else [program, *argv]


def torchrun_command(processes: int, program: str, argv: Sequence[str]) -> list[str]:
    """Return the torchrun command for this program, which was started by plain python, on several processes.

    Args:
        processes: number of processes to start.
        program: name of the entry script, used if the command cannot be determined.
        argv: arguments of the entry script.

    Returns:
        The words of the command.
    """
    command = list(sys.orig_argv)
    script = len(command) - len(argv) - 1  # index of the script or module
    if script < 1 or command[script + 1 :] != list(argv):
        return ["torchrun", "--nproc_per_node", str(processes), program, *argv]
    # `python -m package.program`: torchrun has the same flag.
    module_flag = ["-m"] if command[script - 1] == "-m" else []
    # If Python was started by its path, its environment may not be active, and torchrun is in the same directory.
    has_path = "/" in command[0]
    torchrun = Path(command[0]).with_name("torchrun") if has_path else Path("torchrun")
    exists = torchrun.exists() if has_path else shutil.which(torchrun) is not None
    launcher = [str(torchrun)] if exists else [command[0], "-m", "torch.distributed.run"]
    return [*launcher, "--nproc_per_node", str(processes), *module_flag, *command[script:]]
