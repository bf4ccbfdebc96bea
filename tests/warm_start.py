"""Starts the servers of `warm.py`, and makes the stand-in for python that asks them, whose path is then in WARM_PYTHON.

Tests start programs with it whose matter is what the program does. Where the start itself is the matter they take
`sys.executable`, as for every program at least one test does.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


class WarmServers:
    """Two servers, for what hangs on the order of a set differs between them, as between processes."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        path = Path(self.folder.name) / "socket"
        python = path.with_name("python")
        words = [sys.executable, "-S", "-E", HERE / "warm_python.py", sys.executable, path]
        python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        python.chmod(0o755)
        os.environ["WARM_PYTHON"] = str(python)
        command = [sys.executable, str(HERE / "warm.py")]
        self.servers = [
            subprocess.Popen([*command, f"{path}.{n}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) for n in (0, 1)
        ]

    def end(self) -> None:
        """End the servers, and whatever they have forked that still runs."""
        for server in self.servers:
            server.stdin.close()
        for server in self.servers:
            server.wait()
        self.folder.cleanup()
