"""A flag by the book: a field, a rule and what follows, in the file of one section, and every reader of settings has it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from legal_run import LEGAL

ROOT = Path(__file__).parents[2]
FIELD = """    eval_patience: int | None = option(None, "evaluations without a better loss until the run stops", legal=POSITIVE)
"""
RULE = '''

def patience(c: ConfigCheck) -> Iterator[Problem]:
    """Patience needs evaluations."""
    if c.is_set("eval.eval_patience") and c["eval.eval_interval"] == 0:
        yield Problem(c.flag_text("eval.eval_patience"), "needs `--eval-interval`")


RULES = Rules(every_run=(patience,))
'''
# A number that follows from others: declared once, and again as one that a run always has.
DERIVED = """    half_batch_size: int | None = option(None, "half of a global batch; default so", legal=POSITIVE)
"""
ALWAYS = "    half_batch_size: int = field()\n"
FOLLOWS = "replace(batch, half_batch_size=batch.half_batch_size or (batch.global_batch_size or 0) // 2 or None)"
IMPORTS = """from collections.abc import Iterator
from megatron.config.check import ConfigCheck, Rules
from megatron.config.errors import Problem
from megatron.config.option import NOT_NEGATIVE, POSITIVE, option
"""
ASK = """
import json, sys
from megatron.config.command_line.help import help_text
from megatron.config.command_line.parse import parse
from megatron.config.command_line.saved import from_json, to_json, to_toml
from megatron.config.errors import ConfigError
from megatron.config.resolve import resolve

def problems(argv):
    try:
        parse(argv, program="test", check_disk=False)
    except ConfigError as error:
        return [str(p) for p in error.problems]

def half(*more):
    config = parse([*argv, "--global-batch-size", "6", *more], program="test", check_disk=False).config
    return config.batch.half_batch_size

argv, toml = json.loads(sys.argv[1]), sys.argv[2]
config = parse([*argv, "--eval-patience", "3"], program="test", check_disk=False).config
open(toml, "w").write(to_toml(config))
print(json.dumps({
    "help": [line for line in help_text("test").splitlines() if "--eval-patience" in line],
    "default": parse(argv, program="test", check_disk=False).config.eval.eval_patience,
    "value": config.eval.eval_patience,
    "saved": resolve(from_json(json.loads(json.dumps(to_json(config))))) == config,
    "toml": parse(["--config", toml], program="test", check_disk=False).config.eval.eval_patience,
    "text": problems([*argv, "--eval-patience", "soon"]),
    "range": problems([*argv, "--eval-patience", "0"]),
    "rule": problems([*argv, "--eval-patience", "3", "--eval-interval", "0"]),
    "half": [half(), half("--half-batch-size", "2")],
    "odd": problems([*argv, "--half-batch-size", "none"]),
    "near": problems([*argv, "--eval-pateince", "3"]),
}))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a new flag in one file."""
    root = tmp_path_factory.mktemp("new_flag")
    shutil.copytree(ROOT / "megatron", root / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_gpt.py", root)
    section = root / "megatron" / "config" / "eval.py"
    head, body = section.read_text(encoding="utf-8").split("@dataclass(frozen=True)\n", 1)
    kept = "".join(line + "\n" for line in head.splitlines() if not line.startswith("from megatron"))
    body = body.replace("\n\n\nRULES = Rules()\n", "\n" + FIELD + RULE)
    assert FIELD in body and RULE in body
    section.write_text(f"{kept}{IMPORTS}\n\n@dataclass(frozen=True)\n{body}", encoding="utf-8")
    section = root / "megatron" / "config" / "batch.py"
    body = section.read_text(encoding="utf-8")
    for before, line in (
        ("    train_iters: int", DERIVED),
        ("    global_batch_size: int = field()\n", ALWAYS),
    ):
        assert body.count(before) == 1
        body = body.replace(before, line + before)
    assert body.count("\n    return batch\n") == 1
    section.write_text(body.replace("\n    return batch\n", f"\n    return {FOLLOWS}\n"), encoding="utf-8")
    return root


def run(root: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def argv() -> list[str]:
    return [word for name, value in LEGAL.items() for word in (f"--{name}", value)]


def test_command_line_help_toml_and_saved_settings_have_it(changed: Path) -> None:
    found = json.loads(run(changed, "-c", ASK, json.dumps(argv()), str(changed / "run.toml")))
    assert found == {
        "help": ["  --eval-patience N                   evaluations without a better loss until the run stops"],
        "default": None,
        "value": 3,
        "saved": True,
        "toml": 3,
        "text": ["`--eval-patience soon` is not an integer"],
        "range": ["`--eval-patience 0` must be greater than 0"],
        "rule": ["`--eval-patience 3` needs `--eval-interval`"],
        "half": [3, 2],
        "odd": ["`--half-batch-size none` is not an integer"],
        "near": ["`--eval-pateince` is not a known flag; did you mean --eval-patience?"],
    }


def test_the_dry_run_shows_it(changed: Path) -> None:
    shown = run(changed, "pretrain_gpt.py", *argv(), "--mock-data", "--data-path", "--eval-patience", "3", "--dry-run")
    assert "\neval-patience = 3\n" in shown and "\nhalf-batch-size = 1\n" in shown


def test_a_run_without_a_derived_number_is_refused(changed: Path) -> None:
    ask = """
from megatron.config.schema import BatchConfig
try:
    BatchConfig(micro_batch_size=1, global_batch_size=2)
except TypeError as error:
    print(error)
"""
    assert "'half_batch_size'" in run(changed, "-c", ask)
