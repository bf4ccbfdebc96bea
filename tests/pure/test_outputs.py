"""A tool writes neither over what it reads, however that is spelt, nor over a directory that it did not make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.files.outputs import (
    InputPaths,
    OutputError,
    check_file,
    check_folder,
    check_picture,
    check_replaceable,
    write_marker,
)

ALIASES = {
    "itself": lambda folder: folder / "in.txt",
    "relative": lambda folder: Path(os.path.relpath(folder / "in.txt")),
    "upwards": lambda folder: folder / "sub" / ".." / "in.txt",
    "link": lambda folder: folder / "link",
    "a link to a link": lambda folder: folder / "link2",
    "hard link": lambda folder: folder / "hard",
    "through a linked directory": lambda folder: folder / "linked" / "in.txt",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    (folder / "sub").mkdir(parents=True)
    (folder / "in.txt").write_text("precious")
    (folder / "link").symlink_to("in.txt")
    (folder / "link2").symlink_to(folder / "link")
    os.link(folder / "in.txt", folder / "hard")
    (folder / "linked").symlink_to(folder)
    return folder


@pytest.mark.parametrize("alias", ALIASES)
def test_a_file_that_is_read_by_any_name(folder: Path, alias: str) -> None:
    read, other = folder / "in.txt", ALIASES[alias](folder)
    for output, reads in ((other, read), (read, other)):
        with pytest.raises(OutputError, match="which this command reads"):
            check_file("--output", output, InputPaths([reads]))


def test_a_file_in_a_directory_that_is_read(folder: Path, tmp_path: Path) -> None:
    os.link(folder / "in.txt", tmp_path / "outside")
    for output in (folder / "in.txt", folder / "new", folder / "sub" / "new", tmp_path / "outside"):
        with pytest.raises(OutputError, match=f"is in {folder}"):
            check_file("--output", output, InputPaths([folder]))
    with pytest.raises(OutputError, match="is a directory"):
        check_file("--output", folder, InputPaths([]))


def test_an_output_file_that_is_no_input_is_legal(folder: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "new", folder / "new", folder / "in.txt.svg", tmp_path / "b" / "in.txt"):
        check_file("--output", output, InputPaths([folder / "in.txt", folder / "missing"]))
    with pytest.raises(OutputError):  # also one that is not there yet
        check_file("--output", folder / "sub" / ".." / "missing", InputPaths([folder / "missing"]))


def test_a_picture_replaces_only_a_picture(folder: Path) -> None:
    (folder / "old.svg").write_text('<svg xmlns="x"></svg>')
    (folder / "empty").write_text("")
    for name in ("old.svg", "empty", "new.svg"):
        check_picture("--output", folder / name)
    with pytest.raises(OutputError, match="not an SVG picture"):
        check_picture("--output", folder / "in.txt")


def test_an_input_folder_is_not_written_to(folder: Path) -> None:
    check_folder("--save", folder / "sub", [folder])
    for output in (folder, folder / "sub" / "..", folder / "linked", Path(f"{folder}/")):
        with pytest.raises(OutputError, match="which this command reads"):
            check_folder("--save", output, [folder])
    with pytest.raises(OutputError, match=r"in\.txt is a file, not a directory"):
        check_folder("--save", folder / "in.txt", [])


def test_a_directory_that_would_be_replaced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaceable(output: Path | str, overwrite: bool = True) -> Path:
        return check_replaceable("--output", output, [folder / "sub"], overwrite=overwrite)

    for output in (folder, tmp_path, "/", folder / "sub" / ".."):
        with pytest.raises(OutputError, match="contains"):
            replaceable(output)
    with pytest.raises(OutputError, match="which this command reads"):
        replaceable(folder / "sub")
    with pytest.raises(OutputError, match="is in"):
        replaceable(folder / "sub" / "new")
    with pytest.raises(OutputError, match="is a symlink"):
        replaceable(folder / "linked")
    made = tmp_path / "made"
    made.mkdir()
    assert replaceable(made) == replaceable(tmp_path / "a" / ".." / "made") == made  # it is empty
    (made / "model").write_text("")
    monkeypatch.chdir(made)
    for here in (".", "..", made):
        with pytest.raises(OutputError, match=r"runs in|contains"):
            replaceable(here)
    monkeypatch.chdir("/")
    with pytest.raises(OutputError, match="not empty"):
        replaceable(made, overwrite=False)
    with pytest.raises(OutputError, match="not made by"):
        replaceable(made)
    write_marker(made, "test", ["model"])
    (made / ".x.12-0123abcd.tmp").write_text("")  # what a killed command left
    assert replaceable(made) == made
    (made / "notes.txt").write_text("")
    with pytest.raises(OutputError, match=r"did not write: notes\.txt"):
        replaceable(made)
