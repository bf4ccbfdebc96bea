"""Places in which nothing can be written, in the output of every tool: one message before any work, and exit status 2."""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BASE, save_model

from megatron.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]
TOOLS = {  # OUT: the output
    "tools/export_hf.py": "--load run --output OUT --no-verify",
    "tools/import_hf.py": "--input run --save OUT",
    "tools/import_megatron.py": "--load lm --save OUT",
    "tools/export_megatron.py": "--load run --save OUT",
    "tools/preprocess_data.py": "--input corpus.jsonl --tokenizer-type ByteTokenizer --output-prefix OUT/x",
    "tools/merge_datasets.py": "--input corpus --output-prefix OUT/x",
    "tools/train_tokenizer.py": "--input corpus.jsonl --vocab-size 300 --output OUT",
    "tools/plot_metrics.py": "metrics.jsonl --output OUT/x.svg",
    "tools/draw_schedule.py": "--schedule 1f1b --stages 2 --microbatches 2 --output OUT/x.svg",
    "examples/quickstart/corpus.py": "OUT/x.jsonl",
    "examples/tiny_shakespeare_char/prepare.py": "corpus.txt OUT",
}
PLACES = {
    "a dangling link": ("loose", "loose is a link to nowhere, which does not exist"),
    "below a dangling link": ("loose/x", "loose is a link to nowhere, which does not exist"),
    "a file": ("corpus.txt", "corpus.txt is a file, not a directory"),
    "below a file": ("corpus.txt/x/y", "corpus.txt is a file, not a directory"),
    "the kernel's": ("/proc/x", "/proc belongs to the kernel, and no file can be made there"),
    "below a device": ("/dev/null/x", "/dev/null is a device, not a directory"),
    "no permission": ("locked/x", "permission denied in"),
    "read-only": ("mounted/x", "is on a file system that is mounted read-only"),
    "a long name": ("x" * 300 + "/y", "a name in it has more than 255 bytes"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    (root / "corpus.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    (root / "corpus.txt").write_text("some text\n" * 9)
    (root / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 2.0}\n')
    for name in ("lm", "locked", "mounted"):
        (root / name).mkdir()
    (root / "loose").symlink_to("nowhere")
    save_model(str(root / "run"), BASE | {"vocab_size": 257}, 1, torch.float32, ByteTokenizer())
    return root


@pytest.fixture
def strict_disk(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two directories that refuse, also to root, to whom permissions mean nothing."""
    access, statvfs = os.access, os.statvfs

    def may(path: Any, mode: int, **more: Any) -> bool:
        return not (Path(path) == inputs / "locked" and mode & os.W_OK) and access(path, mode, **more)

    def about(path: Any) -> Any:
        found = statvfs(path)
        flags = found.f_flag | os.ST_RDONLY if Path(path) == inputs / "mounted" else found.f_flag
        return os.statvfs_result((*found[:8], flags, *found[9:]))

    monkeypatch.setattr(os, "access", may)
    monkeypatch.setattr(os, "statvfs", about)
    monkeypatch.chdir(inputs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tool", TOOLS)
def test_an_impossible_output_place_is_refused_before_any_work(
    tool: str, place: str, inputs: Path, strict_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, why = PLACES[place]
    before = sorted(inputs.rglob("*"))
    monkeypatch.setattr(sys, "argv", [tool, *TOOLS[tool].replace("OUT", out).split()])
    printed, err = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(err), pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    said = err.getvalue().splitlines()
    assert done.value.code == 2, (done.value.code, said)
    assert len(said) == 1 and said[0].startswith("error: ") and out in said[0], said
    # A link is named as one by what replaces a directory as a whole.
    assert why in said[0] or (tool == "tools/export_hf.py" and place == "a dangling link" and "is a symlink to" in said[0]), (
        said
    )
    assert sorted(inputs.rglob("*")) == before
