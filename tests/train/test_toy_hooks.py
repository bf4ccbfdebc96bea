"""A periodic action, a metric on the log line and a sink that another package brings take part in a run of pretrain_gpt.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy_hooks
from source_files import ROOT

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 "
    "--global-batch-size 4 --lr 1e-2 --lr-decay-style constant --train-iters 7 --log-interval 2 --eval-interval 5 "
    "--eval-iters 1 --hidden-dropout 0 --attention-dropout 0 --mock-data --split 80,10,10 --tokenizer-type ByteTokenizer "
    "--save-interval 100"
)
LAST = re.compile(rf"the last {toy_hooks.NAME} is \d")


def install_toy_hooks(site: Path, *entries: str) -> dict[str, str]:
    """The environment in which a package with these entry points is installed."""
    about = site / "toy_hooks-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-hooks\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(("[megatron.hooks]", *entries, "")))
    (site / "toy_hooks.py").write_text(Path(toy_hooks.__file__).read_text())
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def pretrain(environment: dict[str, str], save: Path, *flags: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "pretrain_gpt.py"), *FLAGS.split(), "--save", str(save), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def read_metrics(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def read_norms(save: Path, rank: int = 0) -> dict[int, float]:
    pairs = (line.split() for line in (save / f"norms.{rank}").read_text().splitlines())
    return {int(iteration): float(norm) for iteration, norm in pairs}


def test_an_installed_package_takes_part_in_a_run(tmp_path: Path) -> None:
    environment = install_toy_hooks(tmp_path / "site", "norm = toy_hooks:EmbeddingNorm")
    alone, several, plain = tmp_path / "alone", tmp_path / "several", tmp_path / "plain"
    done = pretrain(environment, alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> hook of a package: norm, toy_hooks:EmbeddingNorm\n") == 1
    assert done.stdout.count(f" | {toy_hooks.NAME}: ") == 3 and len(LAST.findall(done.stdout)) == 1

    assert read_norms(alone).keys() == {3, 6}
    tally = json.loads((alone / "tally.json").read_text())
    logged = [line for line in read_metrics(alone) if "split" not in line]
    assert tally["lines"] == [[line["iteration"], line["lm_loss"], line[toy_hooks.NAME]] for line in logged]
    assert [line[0] for line in tally["lines"]] == [2, 4, 6] and tally["lines"][2][2] == read_norms(alone)[6]
    assert tally["evaluations"] == [[5, "validation"], [7, "validation"], [7, "test"]] and tally["ended"] == "finished"

    done = pretrain(environment, several, "--tensor-model-parallel-size", "2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert read_norms(several) == read_norms(several, 1) == pytest.approx(read_norms(alone), rel=1e-5)
    assert len(LAST.findall(done.stdout)) == 1 and len(json.loads((several / "tally.json").read_text())["lines"]) == 3

    done = pretrain({**environment, "PYTHONPATH": str(ROOT)}, plain)
    assert done.returncode == 0 and toy_hooks.NAME not in done.stdout
    assert [line["lm_loss"] for line in read_metrics(plain)] == [line["lm_loss"] for line in read_metrics(alone)]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("old_hooks:Gone", "needs old_hooks:Gone, which cannot be loaded: No module named 'old_hooks'"),
        ("toy_hooks:Gone", "needs toy_hooks:Gone, which cannot be loaded: module 'toy_hooks' has no attribute 'Gone'"),
        ("toy_hooks:NAME", "needs toy_hooks:NAME, which cannot be loaded: 'str' object is not callable"),
        ("pathlib:Path", "needs pathlib:Path, which returns no Hook"),
    ],
)
def test_what_is_no_hook_is_refused_before_anything_is_done(entry: str, said: str, tmp_path: Path) -> None:
    done = pretrain(install_toy_hooks(tmp_path / "site", f"bad = {entry}"), tmp_path / "save")
    assert done.returncode == 2 and f"error: the hook bad {said}" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "save").exists()
