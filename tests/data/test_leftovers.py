"""Files that a killed command leaves beside its output go with the next one for the same place; another command's stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megatron.config.schema import TokenizerConfig
from megatron.data.encode import PreprocessConfig
from megatron.data.index_cache import IndexCache, file_lock
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.merge import merge_datasets
from megatron.data.preprocess import preprocess

# Writes a dataset up to its last rename, says so, and waits for what comes.
WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from megatron.data.indexed import IndexedWriter
from megatron.data.preprocess import RejectedLines
from megatron.files import pending
rejected = RejectedLines(sys.argv[1])
rejected.add([("a bad line", b"x")])
writer = IndexedWriter(sys.argv[1] + "_text_document", np.dtype("<u2"))
writer.add_document(np.arange(9), [9])
def wait(file):
    print("ready", flush=True)
    time.sleep(60)
pending.PendingFile.commit = wait
writer.finish({})
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["preprocess", "merge"])
def test_what_a_killed_writer_left_goes(tmp_path: Path, how: str) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    with IndexedWriter(str(tmp_path / "a"), np.dtype("<u2")) as made:
        made.add_document(np.arange(9), [9])
        made.finish()
    out = tmp_path / "out"
    out.mkdir()
    (out / "o_text_document.bin.77.tmp").write_text("left by a version that held no locks")
    (out / "o_text_document.bin.tmp").write_text("somebody's")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(out / "o")], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        living = set(names(out)) - {"o_text_document.bin.tmp"}
        assert len(living) == 4  # three files of the dataset and one of the lines

        def again() -> None:
            if how == "preprocess":
                preprocess([str(tmp_path / "c.jsonl")], str(out / "o"), PreprocessConfig(TokenizerConfig("ByteTokenizer")))
            else:
                merge_datasets([str(tmp_path / "a")], str(out / "o_text_document"))
            assert IndexedDataset(str(out / "o_text_document")).token_count == 9

        again()
        assert living < set(names(out))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        again()
        left = {name for name in names(out) if name.endswith(".tmp")} - {"o_text_document.bin.tmp"}
        assert left == ({name for name in living if ".bad." in name} if how == "merge" else set())
        assert (out / "o_text_document.bin.tmp").exists()
    finally:
        writer.kill()
        writer.wait()


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text")
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    arguments = ["--input", "text", "--output-prefix", "o", "--tokenizer-type", "ByteTokenizer", "--workers", "2"]
    command = [sys.executable, tool, *arguments, "--log-interval", "1"]
    with (
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent,
        open(tmp_path / "text", "wb", buffering=0) as text,
    ):
        try:
            for _ in range(9):  # blocks for both workers, and no end
                text.write(json.dumps({"text": "a" * (1 << 20)}).encode() + b"\n")
            assert parent.stderr is not None and "documents" in parent.stderr.readline()
            assert len(living_processes(parent.pid)) >= 3
            parent.kill()
            parent.wait()
            deadline = time.monotonic() + 30
            while (left := living_processes(parent.pid)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not left
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)


def living_processes(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, _, session = place.read_text().rpartition(") ")[2].split()[:4]
            found += [int(place.parent.name)] if int(session) == leader and state not in "ZX" else []
    return found


def test_the_cache_removes_what_builders_of_other_indices_left(tmp_path: Path) -> None:
    source = tmp_path / "a.idx"
    source.write_text("")

    def build(key: int) -> None:
        IndexCache(str(tmp_path / "cache")).get("a", {"key": key}, lambda: {"x": np.arange(3)}, str(source))

    build(1)
    (folder,) = (tmp_path / "cache").iterdir()
    for name in ("0123456789abcdef.12.tmp", "fedcba9876543210.13.tmp"):
        (folder / name).mkdir()
    with file_lock(folder / ".fedcba9876543210.lock", 0.0):  # somebody is building that one
        build(2)
        assert [path.name for path in folder.glob("*.tmp")] == ["fedcba9876543210.13.tmp"]
    build(3)
    assert not list(folder.glob("*.tmp"))
