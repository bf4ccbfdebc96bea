"""Programs end in one line where something around them is wrong: the Python, its packages, whoever reads the output."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.launch.entry import activation_command, loading, missing_package, run_main
from megatron.launch.errors import JobError
from megatron.launch.packages import EXTRAS, install_command

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [
    *ROOT.glob("pretrain_*.py"),
    ROOT / "tasks" / "main.py",
    *(path for path in (ROOT / "tools").glob("*.py") if path.name != "install.py"),  # which runs before anything is there
    *(path for path in ROOT.glob("examples/*/*.py") if "__main__" in path.read_text(encoding="utf-8")),
]
NAMES = sorted(path.relative_to(ROOT).as_posix() for path in PROGRAMS)


def run(program: str, *arguments: str, python: str = sys.executable, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [python, *arguments[: arguments.count("-S")], str(ROOT / program), *arguments[arguments.count("-S") :]]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, check=False, **settings)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_imported_before_the_python_is_known_to_fit(name: str) -> None:
    """A program's own text can be parsed by old Pythons too; all but the standard library is imported inside `loading()`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    module = ast.parse(text, feature_version=(3, 8))
    modules = set()
    for node in module.body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    assert {m for m in modules if m.split(".")[0] not in sys.stdlib_module_names} == {"megatron.launch.entry"}
    assert "sys.exit(run_main(" in ast.unparse(module.body[-1])


def test_the_first_file_reads_in_old_pythons() -> None:
    for name in ("__init__", "launch/__init__", "launch/entry", "launch/packages"):
        ast.parse((ROOT / "megatron" / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize("name", NAMES)
def test_a_python_without_packages(name: str) -> None:
    """As without an active environment: `-S` leaves out all that is installed."""
    done = run(name, "-S", "--help", stdout=subprocess.DEVNULL)
    assert "Traceback" not in done.stderr
    if done.returncode:  # else it needs none for its help
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert " is not installed for " in done.stderr and ("/bin/activate`" in done.stderr or "make install" in done.stderr)


def test_a_package_that_is_needed_later() -> None:
    done = run("tools/export_hf.py", "-S", "--load", "x", "--output", "y", stdout=subprocess.DEVNULL)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: torch is not installed for ") and done.stderr.count("\n") == 1
    )


def test_the_environment_that_is_named_is_the_projects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert "`source .venv/bin/activate`" in activation_command()
    monkeypatch.chdir(tmp_path)
    assert f"`source {ROOT}/.venv/bin/activate`" in activation_command()


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_an_old_python_is_refused_in_one_line(version: str) -> None:
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if not found:
        pytest.skip(f"this machine has no Python {version}")
    for name in NAMES[::6]:
        done = run(name, "--help", python=str(found[0]), stdout=subprocess.DEVNULL)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (name, done.stderr)
        assert done.stderr.startswith("error: Python 3.11 or newer is needed, and ")


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("tools/draw_schedule.py", "--schedule 1f1b --stages 2 --microbatches 4"),
        ("tools/plot_metrics.py", "--help"),
        ("examples/quickstart/run.py", "--help"),
        ("pretrain_gpt.py", "--help"),
        ("pretrain_gpt.py", "--preset gpt-1.2b --seq-length 8 --micro-batch-size 1 --train-iters 9 --lr 1 --dry-run"),
    ],
)
def test_a_reader_that_leaves(program: str, arguments: str) -> None:
    """`program | head`: silent, with the status of what SIGPIPE ends."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = run(program, *arguments.split(), stdout=theirs, cwd=ROOT)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_the_output() -> None:
    with open("/dev/full", "wb") as full:
        done = run("tools/draw_schedule.py", "--schedule", "1f1b", "--stages", "2", "--microbatches", "4", stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


def test_a_broken_pipe_is_no_error_of_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler of OSError around a `print` must not take it for its own."""
    ours, theirs = os.pipe()
    os.close(ours)
    monkeypatch.setattr(sys, "stdout", os.fdopen(theirs, "w", buffering=1))

    def main() -> int:
        try:
            print("a line")
        except OSError:
            return 2
        return 0

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 141


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (JobError("in words", 2), 2, "error: in words\n"),
        (MemoryError("Unable to allocate 1 TiB"), 1, "error: out of memory: Unable to allocate 1 TiB; "),
    ],
)
def test_what_ends_a_program_in_a_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(raising, error) == status
    assert capsys.readouterr().err.startswith(said)


def test_errors_that_a_tool_knows_are_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"wrong": (KeyError, ValueError), "failed": OSError}
    assert run_main(raising, ValueError("asked"), **kinds) == 2 and capsys.readouterr().err == "error: asked\n"
    assert run_main(raising, OSError("met"), **kinds) == 1 and capsys.readouterr().err == "error: met\n"
    with pytest.raises(ZeroDivisionError):
        run_main(raising, ZeroDivisionError(), **kinds)


def test_other_errors_keep_their_traceback() -> None:
    for error in (ValueError("unknown"), ModuleNotFoundError("No module named 'x'", name="x")):
        with pytest.raises(type(error)):
            run_main(raising, error)


def test_ctrl_c_during_imports(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, loading():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr() == ("", "")


def test_one_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_main(raising, KeyboardInterrupt()) == 130
    with pytest.raises(SystemExit), loading():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    assert capsys.readouterr().err == ""


def test_extras_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for module, extra in EXTRAS.items():
        error = ModuleNotFoundError(f"No module named '{module}'", name=module)
        assert f"\n{extra} = [" in project and missing_package(error).endswith(f": run `pip install -e '.[{extra}]'`")


def test_no_text_installs_somebody_elses_package() -> None:
    """On the index `megatron` is another project, and zsh takes an unquoted bracket for a pattern."""
    wrong = []
    for suffix in ("py", "md", "sh", "toml", "sbatch"):
        for path in [
            *ROOT.glob(f"*.{suffix}"),
            *(
                p
                for d in ("megatron", "tools", "tasks", "examples", "benchmarks", "tests")
                for p in (ROOT / d).rglob(f"*.{suffix}")
            ),
        ]:
            if path == Path(__file__).resolve():
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                _, found, rest = line.partition("pip install ")
                words = rest.split("`")[0]
                named = any(f"{quote}megatron" in f" {words}" for quote in (" ", "'", '"'))
                unquoted = ".[" in words.replace("'.[", "").replace('".[', "")
                extra = any(word.strip("',.()\"") in EXTRAS for word in words.split())
                if found and (named or unquoted or extra):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)
    assert install_command("uvicorn") == "pip install -e '.[server]'"


def test_quickstart_says_what_it_is_and_does_nothing(tmp_path: Path) -> None:
    before = (ROOT / "runs" / "quickstart").exists()
    shown = run("examples/quickstart/run.py", "--help", stdout=subprocess.PIPE)
    assert shown.returncode == 0 and "make quickstart" in shown.stdout and shown.stderr == ""
    wrong = run("examples/quickstart/run.py", "--quick", stdout=subprocess.PIPE)
    assert wrong.returncode == 2 and wrong.stdout == "" and "unrecognized arguments: --quick" in wrong.stderr
    assert (ROOT / "runs" / "quickstart").exists() == before
