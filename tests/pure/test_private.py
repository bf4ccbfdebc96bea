"""Files in the machine's place for temporary ones: what another user planted there is neither followed nor used."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.files.private import PrivateDirectory
from megatron.launch.heartbeat import Process
from megatron.launch.status_file import SIZE, StatusFile, read_status, remove_status


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, which others share."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"megatron-{os.geteuid()}"


def test_a_peer_reads_what_a_process_wrote(place: Path) -> None:
    own = Process.own()
    slate = StatusFile(own)
    (file,) = place.iterdir()
    assert file.stat().st_blocks > 0  # a page without a block could end the process, on a disk that is full by then
    slate.write("training step 7")
    assert read_status(own, own) == "training step 7"
    assert place.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600 and file.stat().st_size == SIZE
    slate.wipe()
    assert not list(place.iterdir()) and read_status(own, own) is None


def plant(place: Path, victim: Path, kind: str) -> None:
    if kind == "a link":
        (victim / "inner").mkdir(mode=0o700, parents=True)
        place.symlink_to(victim / "inner")
    elif kind == "open to others":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.write_text("a file")


@pytest.mark.parametrize("kind", ["a link", "open to others", "a file"])
def test_what_somebody_planted_is_not_used(place: Path, tmp_path: Path, kind: str) -> None:
    plant(place, tmp_path / "victim", kind)
    with pytest.raises(OSError):
        PrivateDirectory()
    own = Process.own()
    slate = StatusFile(own)
    slate.write("a phase")
    assert read_status(own, own) is None  # it stays in memory
    if place.is_dir():
        assert not list(place.iterdir())
    slate.wipe()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_another_users_directory_is_not_used(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)
    with pytest.raises(PermissionError, match="not a directory of this user alone"):
        PrivateDirectory()


def test_a_link_inside_is_replaced_and_not_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious " * 100)
    with PrivateDirectory() as directory:
        (place / "name").symlink_to(tmp_path / "victim")
        with pytest.raises(OSError):
            directory.read("name", 10)
        os.close(directory.create("name"))
    assert (tmp_path / "victim").read_text() == "precious " * 100 and not (place / "name").is_symlink()


def test_status_files_of_dead_processes_are_removed(place: Path) -> None:
    own = Process.own()
    dead = replace(own, pid=2**22 + 1, started=5)
    elsewhere = replace(dead, space="another boot")
    with PrivateDirectory() as directory:
        for process in (dead, elsewhere):
            StatusFile(replace(process, pid=own.pid))  # the name is what counts
        before = set(directory.names())
    assert len(before) == 2
    StatusFile(own)
    assert before < {path.name for path in place.iterdir()}, "who watched it reads its last words first"
    for path in place.iterdir():
        os.utime(path, (0, 0))
    StatusFile(own)
    left = {path.name for path in place.iterdir()}
    assert len(left) == 2 and len(left & before) == 1  # its own, and that of a space which it cannot look into
    remove_status(own)
    remove_status(replace(elsewhere, pid=own.pid))
    assert not list(place.iterdir())
