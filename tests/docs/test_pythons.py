"""The Pythons that install, the suite on all of a machine's, and texts that do not come with any of them."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from texts import pages

ROOT = Path(__file__).resolve().parents[2]
(TORCH,) = re.findall("^torch==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "venv", "said"),
    [
        ((3, 9, 18), ".venv", "Python 3.11 or newer is needed, "),
        ((3, 10, 0), "system", "Python 3.11 or newer is needed, "),
        (
            (3, 15, 0),
            ".venv",
            f"torch {TORCH} needs Python 3.11 to 3.14, ",
        ),
    ],
)
def test_a_python_that_will_not_do(
    version: tuple[int, ...], venv: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install = load("tools/install")
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", venv])
    assert install.main() == 2
    where = f"{sys.executable} is {'.'.join(map(str, version))}"
    assert capsys.readouterr().err == f"error: {said}{where}; name another: make PYTHON=python3.12 ...\n"


@pytest.mark.parametrize(("version", "venv"), [((3, 11, 0), ".venv"), ((3, 14, 2), ".venv"), ((3, 15, 0), "system")])
def test_pythons_that_will_do(version: tuple[int, ...], venv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one has the torch that it is to be used with, whatever that is."""
    install = load("tools/install")
    monkeypatch.setattr(sys, "version_info", version)
    assert install.check_version(venv) is None


def test_an_environment_of_another_python_is_not_used_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(tmp_path / "venv" / "bin" / "python", "echo 3.9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv")])
        assert load("tools/install").main() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/venv is an environment of Python 3.9, and {sys.executable} is 3.")
    assert "make VENV=.venvs/3." in error and error.count("\n") == 1


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """3.11 and 3.13 on PATH, the second broken as pyenv's place-holders are; 3.9, two of 3.12 and 3.13 with pyenv; a `make`."""
    pyenv = tmp_path / "pyenv" / "versions"
    for path, version in {
        tmp_path / "bin" / "python3.11": "3.11.2",
        tmp_path / "bin" / "python3": "3.11.2",
        pyenv / "3.9.18" / "bin" / "python3": "3.9.18",
        pyenv / "3.12.1" / "bin" / "python3": "3.12.1",
        pyenv / "3.12.10" / "bin" / "python3": "3.12.10",
        pyenv / "3.13.0" / "bin" / "python3": "3.13.0",
    }.items():
        script(path, f"echo {version.replace('.', ' ')}; echo {path}")
    for name in ("python3.12", "python3.13", "python3.14"):
        script(tmp_path / "bin" / name, "echo 'pyenv: command not found' >&2; exit 127")
    script(tmp_path / "bin" / "make", f'echo "$@" >> {tmp_path}/made; case "$*" in *{{BAD}}*) exit 2;; esac')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


@pytest.mark.parametrize(("bad", "status"), [("3.12", 1), ("none", 0)])
def test_the_suite_on_every_python_of_a_machine(
    bad: str, status: int, machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = machine / "bin" / "make"
    make.write_text(make.read_text().replace("{BAD}", f"VENV=.venvs/{bad}"))
    assert load("tests/pythons").main([]) == status
    pyenv = machine / "pyenv" / "versions"
    paths = [machine / "bin" / "python3.11", pyenv / "3.12.10" / "bin" / "python3", pyenv / "3.13.0" / "bin" / "python3"]
    versions = ("3.11.2", "3.12.10", "3.13.0")
    made = (machine / "made").read_text().splitlines()
    assert made == [f"test VENV=.venvs/{v.rpartition('.')[0]} PYTHON={p}" for v, p in zip(versions, paths, strict=True)]
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [(row[0], row[1], row[-1]) for row in table] == [
        (v, "FAILED" if v.startswith(bad) else "passed", str(p)) for v, p in zip(versions, paths, strict=True)
    ]


def test_named_pythons_and_none(machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pythons = load("tests/pythons")
    assert pythons.main(["python3.13", "python3.11"]) == 1
    table = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-2:]]
    assert table[0] == "- does not run python3.13" and table[1].startswith("3.11.2 passed after 0 s python3.11")
    assert len((machine / "made").read_text().splitlines()) == 1
    monkeypatch.setenv("PYENV_ROOT", str(machine / "none"))
    monkeypatch.setenv("PATH", str(machine / "empty"))
    assert pythons.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no Python 3.11 to 3.14 on PATH")


def test_texts_are_the_same_on_every_python() -> None:
    text = "".join(pages(8, 2000))
    assert hashlib.sha256(text.encode()).hexdigest() == "083edd4268e9960454f003acaaa3932c7a4d02e34c1daf3a841c51d5c7514740"
    assert len(set(pages(50, 300))) == 50 and pages(2, 300, seed=1) != pages(2, 300)


def test_no_test_reads_texts_of_its_interpreter() -> None:
    """Texts that come with Python differ between versions, and a number measured on one holds for that one alone."""
    sources = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    foreign = re.compile(r"pydoc_data|sysconfig|inspect\.getsource")
    found = [path.name for path in sources if path != Path(__file__) and foreign.search(path.read_text(encoding="utf-8"))]
    assert not found, f"take tests/texts.py: {found}"
