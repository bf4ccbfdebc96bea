"""Files and directories that appear whole; what a killed writer leaves goes, what another one writes stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.files.pending import PendingDirectory, PendingFile, remove_leftovers, write_whole

# Begins to write, says so, and waits for what comes.
WRITER = """
import sys, time
from pathlib import Path
from megatron.files.pending import PendingDirectory, PendingFile
kinds = {"file": PendingFile, "directory": lambda path: PendingDirectory(path, "test")}
held = [kinds[kind](Path(sys.argv[1]) / kind) for kind in kinds]
print("ready", flush=True)
time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_a_killed_writer_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        others = [".directory.tmp", "file.12.tmp.txt", "file.tmp"]
        for name in others:
            (tmp_path / name).write_text("somebody's")
        living = names(tmp_path)
        assert len(living) == 5
        write_whole(tmp_path / "file", "whole")
        with PendingDirectory(tmp_path / "directory", "test") as pending:
            assert len(names(tmp_path)) == 7
            pending.commit()
        assert names(tmp_path) == sorted([*living, "file", "directory"])
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert names(tmp_path) == sorted([*living, "file", "directory"])
        remove_leftovers(tmp_path / "file")
        remove_leftovers(tmp_path / ".directory")
        assert names(tmp_path) == sorted([*others, "file", "directory"])
    finally:
        writer.kill()
        writer.wait()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), PendingFile(path) as pending:
        pending.file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    write_whole(path, b"new")
    assert path.read_text() == "new" and names(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_links_and_devices(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "link").is_symlink()
    write_whole(os.devnull, "nothing")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(OSError, match="No space left"):
        write_whole("/dev/full", "x")


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def make(text: str) -> None:
        with PendingDirectory(tmp_path / "made", "test") as pending:
            (pending.temporary / "file").write_text(text)
            if text == "bad":
                raise ZeroDivisionError
            pending.commit(marked=text != "unmarked")

    make("old")
    with pytest.raises(ZeroDivisionError):
        make("bad")
    assert names(tmp_path) == ["made"] and (tmp_path / "made" / "file").read_text() == "old"
    assert names(tmp_path / "made") == [".made-by-megatron", "file"]
    make("unmarked")
    assert names(tmp_path / "made") == ["file"] and names(tmp_path) == ["made"]
