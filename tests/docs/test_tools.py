"""The two tools that belong to no package: the loss curve and the installer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def plot(metrics: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "plot_metrics.py"), str(metrics), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_curve_shows_every_point(tmp_path: Path) -> None:
    lines = [{"iteration": i, "lm_loss": 8.0 - i / 10} for i in range(1, 11)]
    lines += [{"iteration": 5, "split": "validation", "lm_loss": 7.6, "ppl": 1998.2}]
    lines += [{"iteration": 10, "lm_loss": 2.5}]  # a resumed run writes its last iteration again
    lines += [{"iteration": 11, "lm_loss": None}, {"iteration": 12, "split": "test", "lm_loss": 99.0}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(map(json.dumps, lines)) + "\n")
    done = plot(metrics, tmp_path / "loss.svg")
    assert done.returncode == 0, done.stderr
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    curves = [path.attrib["d"] for path in root.iter(f"{SVG}path")]
    assert [curve.count("M") + curve.count("L") for curve in curves] == [10, 1]
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"training, last 2.500", "validation, last 7.600", "iteration", "10"} <= set(words)
    # The curve lies inside the picture, and falls: SVG's y grows downwards.
    points = [tuple(map(float, p[1:].split())) for p in curves[0].replace("L", "|L").replace("M", "|M").split("|") if p]
    assert all(0 < x < 760 and 0 < y < 440 for x, y in points)
    assert points[-1][1] > points[0][1]
    assert points[-1][0] > points[0][0]


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "cannot read"), ("not json\n", ":1"), ("[1]\n", ":1"), ('{"iteration": 1}\n', "no training loss")],
)
def test_what_cannot_be_drawn_is_said(tmp_path: Path, content: str | None, word: str) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_text(content)
    done = plot(metrics, tmp_path / "loss.svg")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert word in done.stderr
    assert not (tmp_path / "loss.svg").exists()


def install(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "install.py"), *arguments]
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=offline, check=False)


def test_nothing_is_installed_where_nothing_is_missing() -> None:
    done = install("--venv", "system")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failing_installation_is_said_and_leaves_no_stamp(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = install("--venv", str(venv))  # without an index there is no torch to be had
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "torch" in done.stderr
    assert not (venv / "megatron-installed").exists()
