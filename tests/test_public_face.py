"""`import megatron`: its names are there, loaded when they are used, and the scripts of docs/python.md run."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from source_files import ROOT, sources, tree

import megatron

SCRIPTS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
MODEL = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16"
RUN = "--micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-3 --eval-iters 0 --mock-data"
ARGS = [*MODEL.split(), *RUN.split(), "--tokenizer-type", "ByteTokenizer"]


def run_python(code: str) -> list[str]:
    """Return the words that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_the_names_are_there_and_are_those_of_the_type_checkers_imports() -> None:
    """Three lists say the same: the table, `__all__`, and the imports that type checkers read."""
    block = next(node for node in tree(ROOT / "megatron" / "__init__.py").body if isinstance(node, ast.If))
    imported = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == megatron._HOMES
    assert set(megatron.__all__) == megatron._HOMES.keys() <= set(dir(megatron))
    for name, home in megatron._HOMES.items():
        module, _, attribute = home.partition(":")
        assert getattr(megatron, name) is getattr(importlib.import_module(module), attribute)
        assert getattr(megatron, name).__doc__, f"{name} does not say what it is"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        megatron.__getattr__("nonsense")


def test_no_name_is_that_of_a_package_which_would_take_its_place() -> None:
    rooms = {path.stem for path in (ROOT / "megatron").iterdir()}
    assert not rooms & set(megatron.__all__)


def test_the_package_itself_imports_only_the_version_from_its_face() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path in sources("megatron")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "megatron" and node.attr in megatron._HOMES
    ]
    assert not wrong, wrong


def test_the_face_is_light_until_it_is_used() -> None:
    light = "import sys, megatron; print(*(name for name in ('torch', 'numpy', 'megatron.cli') if name in sys.modules))"
    assert run_python(light) == []
    # The negative control: what needs torch brings it, a command line does not.
    used = (
        "import sys, megatron; megatron.parse_args; print('torch' in sys.modules); megatron.GPT; print('torch' in sys.modules)"
    )
    assert run_python(used) == ["False", "True"]


def test_the_face_opens_in_milliseconds() -> None:
    code = "import sys, time, typing, importlib; t = time.process_time(); import megatron; print(time.process_time() - t)"
    assert min(float(run_python(code)[0]) for _ in range(3)) < 0.05


def test_the_scripts_of_the_page_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name in ("README.md", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert len(SCRIPTS) == 5
    said = []
    for number, script in enumerate(SCRIPTS):
        assert len([line for line in script.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
        (tmp_path / f"{number}.py").write_text(script)
        command = [os.environ["WARM_PYTHON"], f"{number}.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    assert "iteration       20/      20" in said[2]
    assert "GPT after 20 iterations" in said[3] and "\nA run " in said[3]
    assert (tmp_path / "runs/python/hf/config.json").exists()


def test_a_mistake_raises_with_the_words_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(megatron.ConfigError) as raised:
        megatron.parse_args([*ARGS, "--hidden-size", "33", "--lr", "-1"])
    assert [str(problem) for problem in raised.value.problems] == str(raised.value).splitlines()
    assert "`--lr -1" in str(raised.value) and len(raised.value.problems) == 2
    with pytest.raises(megatron.ConfigError, match="`--num-layers` is missing"):
        megatron.configure(megatron.RunSettings())
    with pytest.raises(megatron.CheckpointError, match="nowhere"):
        megatron.load(tmp_path / "nowhere")
    with pytest.raises(megatron.DataError, match=r"text\.idx"):
        megatron.IndexedDataset(str(tmp_path / "text"))
    config = megatron.parse_args(ARGS)
    config = replace(config, data=replace(config.data, mock_data=False, data_path=("nowhere",)))
    with pytest.raises(megatron.InputError, match=r"no dataset nowhere: nowhere\.idx"):
        megatron.pretrain(config)


def test_notes_on_a_command_line_are_warnings() -> None:
    with pytest.warns(UserWarning, match="--use-flash-attn"):
        megatron.parse_args([*ARGS, "--use-flash-attn"])


def test_settings_without_a_command_line_are_the_same_run() -> None:
    config = megatron.parse_args(ARGS)
    assert megatron.configure(megatron.RunSettings(**{name: getattr(config, name) for name in vars(config)})) == config


def test_a_loop_of_ones_own() -> None:
    config = megatron.parse_args(ARGS)
    config = replace(config, model=replace(config.model, vocab_size=257))
    tokens = torch.randint(257, (2, 17), generator=torch.Generator().manual_seed(0))
    with megatron.job(megatron.LaunchEnvironment()) as job:
        run = megatron.build_run(config, job)
        positions = torch.arange(16).expand(2, 16)
        batch = megatron.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16), positions, torch.arange(2))
        losses = []
        for _ in range(3):
            losses.append(run.step([batch, batch], run.state).lm_loss)
            run.state.consumed_samples += 4
    assert losses[0] == pytest.approx(5.55, abs=0.3)
    assert losses[-1] < losses[0]
    assert isinstance(run.stages[0], megatron.GPT)


def test_training_in_this_process_ends_with_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = megatron.pretrain(megatron.parse_args([*ARGS, "--save", str(tmp_path / "run"), "--save-interval", "3"]))
    assert status is megatron.Exit.FINISHED
    assert "iteration" in capsys.readouterr().out
    opened = megatron.load(tmp_path / "run")
    (found,) = megatron.generate(opened, "ab", max_new_tokens=4, temperature=0.0)
    assert found.text.startswith("ab") and found.end in ("length", "stop") and found.positions_left is None
    assert megatron.generate(opened, "ab", max_new_tokens=40)[0].positions_left in (14, None)
    with pytest.raises(ValueError, match="--top-p 2"):
        megatron.generate(opened, "ab", top_p=2.0)
