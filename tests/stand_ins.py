"""Things that can stand where a file belongs: directories, pipes, sockets, links."""

from __future__ import annotations

import os
import socket
from pathlib import Path

STAND_INS = ("pipe", "device", "directory", "socket", "huge", "dangling", "unreadable", "empty", "cut")


def make_stand_in(name: str, path: Path, good: bytes) -> bool:
    """Make something at `path` that is not the file which is expected there.

    Args:
        name: one of STAND_INS.
        path: where it is made; nothing may be there.
        good: the bytes of a good file, of which some stand-ins hold a part.

    Returns:
        False where it cannot be made: root may read every file.
    """
    match name:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # the name of a socket may have 108 bytes
            try:
                with socket.socket(socket.AF_UNIX) as bound:
                    bound.bind(path.name)
            finally:
                os.chdir(here)
        case "huge":  # 1 TB that takes no room on the disk
            path.write_bytes(good[: len(good) // 2])
            os.truncate(path, 1 << 40)
        case "dangling":
            path.symlink_to("nowhere")
        case "unreadable":
            if os.geteuid() == 0:  # root may read everything
                return False
            path.write_bytes(good)
            path.chmod(0)
        case "empty":
            path.touch()
        case "cut":
            path.write_bytes(good[: len(good) // 2])
    return True
