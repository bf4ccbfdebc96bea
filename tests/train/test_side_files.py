"""Whatever a run writes beside its checkpoints may fail, by any error, and costs one warning: never the run."""

from __future__ import annotations

import builtins
import errno
import io
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_program import metrics, run

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import verify
from megatron.files.side import SideFile, forgiving_streams
from megatron.tasks.finetune import write_results
from megatron.train.ending import Exit
from megatron.train.errors import TrainingError
from megatron.train.event_file import EventFile
from megatron.train.report import Evaluation
from megatron.train.sinks import JsonLines

ROOT = Path(__file__).parents[2]
CHECKPOINTS = re.compile(r"\.?(iter_\d+|latest_checkpointed_iteration)\b.*")


class RefusingDisk:
    """A disk that takes nothing under some directories but checkpoints. seen: the names that it refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, folders: list[Path]) -> None:
        self.code, self.folders, self.seen = code, [str(folder) for folder in folders], set[str]()
        for owner, name in ((os, "open"), (os, "mkdir"), (os, "truncate"), (os, "rename")):
            monkeypatch.setattr(owner, name, self.judged(getattr(owner, name), name))
        opener = self.judged(io.open, "file")
        monkeypatch.setattr(builtins, "open", opener)
        monkeypatch.setattr(io, "open", opener)

    def judged(self, plain: Callable, name: str) -> Callable:
        def call(path, *args, **keywords):
            mode = args[0] if args else keywords.get("mode", "r")
            if name == "open":
                writes = bool(mode & (os.O_WRONLY | os.O_RDWR))
            else:
                writes = name != "file" or bool(set(mode) & set("wax+"))
            if writes and isinstance(path, str | os.PathLike) and self.refuses(os.path.abspath(path)):
                raise OSError(self.code, os.strerror(self.code), str(path))
            return plain(path, *args, **keywords)

        return call

    def refuses(self, path: str) -> bool:
        for folder in self.folders:
            inner = os.path.relpath(path, folder)
            if not inner.startswith("..") and inner != "." and not CHECKPOINTS.match(inner):
                self.seen.add(inner)
                return True
        return False


@pytest.mark.parametrize("code", ["ENOSPC", "EACCES", "EIO", "ENOENT"])
def test_a_run_outlives_every_side_file(flags, tmp_path, monkeypatch, caplog, code):
    names = {"tb": "--tensorboard-dir", "profile": "--profile-pipeline", "cache": "--data-cache-path"}
    more = [word for name, flag in names.items() for word in (flag, tmp_path / "side" / name)]
    (tmp_path / "side").mkdir()
    disk = RefusingDisk(monkeypatch, getattr(errno, code), [tmp_path / "side", tmp_path / "run"])
    with caplog.at_level(logging.WARNING):
        assert run([*flags, *more, "--tensorboard-queue-size", 2]) == Exit.FINISHED
    monkeypatch.undo()
    assert find_checkpoint(tmp_path / "run").name == "iter_0000012" and verify(find_checkpoint(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not list((tmp_path / "side").iterdir())
    assert {"tb", "profile", "cache", "metrics.jsonl"} <= {name.split("/")[0] for name in disk.seen}
    assert any(name.startswith("progress.json") for name in disk.seen)
    for path in ("side/tb", "side/profile", "side/cache", "run/metrics.jsonl", "run/progress.json"):
        said = [record.getMessage() for record in caplog.records if str(tmp_path / path) in record.getMessage()]
        # The cache speaks once for each dataset; the notes of a run's slices are made at its start and its end.
        assert 1 <= len(said) <= {"side/cache": 3, "run/progress.json": 2}.get(path, 1), said
        assert all(os.strerror(getattr(errno, code)) in line for line in said)


def test_a_directory_that_is_removed_is_made_again(tmp_path):
    file = SideFile(tmp_path / "a" / "file", "lines", b"head\n")
    file.add(b"1\n")
    (tmp_path / "a" / "file").unlink()
    (tmp_path / "a").rmdir()
    file.add(b"2\n")
    assert (tmp_path / "a" / "file").read_bytes() == b"head\n2\n"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files end at this size, as on a disk that is full then: a part of the last write is taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_evaluation(sink: JsonLines, iteration: int) -> None:
    sink.evaluation(Evaluation(iteration, "test", 1.0, 8), "")


def test_no_line_is_half_written_and_none_is_lost(tmp_path, caplog):
    sink = JsonLines(tmp_path / "metrics.jsonl", None)
    write_evaluation(sink, 0)
    whole = (tmp_path / "metrics.jsonl").read_text()
    with largest_file(len(whole) + 20):
        for iteration in (1, 2):
            write_evaluation(sink, iteration)
            assert (tmp_path / "metrics.jsonl").read_text() == whole
    write_evaluation(sink, 3)
    assert [line["iteration"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    assert len(caplog.records) == 1 and "metrics cannot be written: File too large" in caplog.text


@pytest.mark.parametrize("resume_at", [None, 2])
@pytest.mark.parametrize("tail", ['{"iteration": 3, "lm', '{"iteration": 2, "lm_loss": 1.0}'])
def test_a_torn_line_does_not_spoil_the_next(tmp_path, resume_at, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"iteration": n, "lm_loss": 1.0}) + "\n" for n in (1, 2, 3)) + tail)
    plot = [sys.executable, ROOT / "tools" / "plot_metrics.py", path, "--output", tmp_path / "loss.svg"]
    if resume_at is None and tail.endswith("lm"):  # also while it is there
        assert subprocess.run(plot, check=False).returncode == 0
    write_evaluation(JsonLines(path, resume_at), 4)
    expected = [1, 2] if resume_at is not None else [1, 2, 3]
    expected += [2] if tail.endswith("}") else []
    assert [line["iteration"] for line in metrics(tmp_path)] == [*expected, 4]


def test_lines_of_the_interrupted_run_go_on_a_full_disk_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"iteration": n}) + "\n" for n in range(1, 9)))
    with largest_file(0):
        JsonLines(path, 5)
    assert [line["iteration"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_tensorboard_reads_what_a_disk_took_that_was_full_for_a_while(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file = EventFile(tmp_path, 2, None)
    for step in range(1, 13):
        with largest_file(300 if 4 <= step <= 8 else resource.RLIM_INFINITY):
            file.scalar("loss", step / 2, step)
    file.flush()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(n, n / 2) for n in range(1, 13)]


class BrokenPipeStream(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("both", [False, True])
def test_a_run_outlives_its_console(flags, tmp_path, monkeypatch, caplog, both):
    monkeypatch.setattr(sys, "stdout", BrokenPipeStream())
    if both:
        monkeypatch.setattr(sys, "stderr", BrokenPipeStream())
    assert run(flags) == Exit.FINISHED
    assert [line["iteration"] for line in metrics(tmp_path / "run") if "split" not in line] == list(range(1, 13))
    assert [record.getMessage() for record in caplog.records if "standard output" in record.getMessage()] == [
        "standard output: cannot be written to: Broken pipe; the run goes on, and lines are lost until it can be written"
    ]


@pytest.mark.parametrize("redirected", [">/dev/full", "| head -c 1 >/dev/null", ">&-"])
def test_a_process_whose_output_goes_nowhere_ends_with_its_own_status(redirected):
    code = "import sys\nfrom megatron.files.side import forgiving_streams\n"
    code += "with forgiving_streams():\n    for _ in range(9999): print('a line', flush=True)\nsys.exit(75)"
    command = f"set -o pipefail; '{sys.executable}' -c \"$CODE\" {redirected}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"CODE": code}
    done = subprocess.run(["bash", "-c", command], env=buffered, capture_output=True, text=True, check=False)
    assert done.returncode == 75 and done.stderr.count("\n") <= 1 and "Exception" not in done.stderr, done.stderr


def test_streams_are_as_before_afterwards(capsys):
    before = sys.stdout
    with forgiving_streams():
        print("inside")
    assert sys.stdout is before and capsys.readouterr().out == "inside\n"


def test_results_that_cannot_be_written_are_printed_and_fail(tmp_path, capsys):
    (tmp_path / "full.json").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="No space left"):
        write_results(str(tmp_path / "full.json"), {"task": "MNLI", "accuracy": math.pi})
    assert json.loads(capsys.readouterr().out)["accuracy"] == math.pi
