"""The reading order of ARCHITECTURE.md: few files, short together, from the program to the update."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from source_files import ROOT, imports

MAX_FILES = 10
MAX_LINES = 1900
ROW = re.compile(r"^\| `([^`]+\.py)` \|", re.MULTILINE)
BETWEEN = "megatron/cli/program.py"  # reads the command; the table's first row speaks of it


def files_in_table(text: str) -> list[str]:
    """The files in the table of the section."""
    return ROW.findall(text.split("\n## Reading order\n")[1].partition("\n## ")[0])


def wrong_with(files: Sequence[str], root: Path) -> str | None:
    missing = [name for name in files if not (root / name).is_file()]
    if missing:
        return f"not there: {missing}"
    lines = sum(len((root / name).read_text(encoding="utf-8").splitlines()) for name in files)
    if len(files) > MAX_FILES or lines > MAX_LINES:
        return f"{len(files)} files with {lines} lines; at most {MAX_FILES} with {MAX_LINES}: shorten one, or part it"
    return None


def module_name(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".")


def listed() -> list[str]:
    return files_in_table((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


def test_one_step_is_read_in_few_files_and_lines() -> None:
    files = listed()
    assert wrong_with(files, ROOT) is None
    assert files[0] == "pretrain_gpt.py" and files[-1] == "megatron/optim/update.py" and len(set(files)) == len(files)


def test_each_file_is_used_by_one_before_it() -> None:
    """So that a reader is never without the place from which a file is called."""
    files = listed()
    for number, name in enumerate(files[1:], 1):
        before = [*files[:1], BETWEEN, *files[1:number]]
        used = {module for other in before for module, _ in imports(ROOT / other)}
        if name == "megatron/model/gpt.py":  # a model by its name in the configuration
            used |= {module for module, _ in imports(ROOT / "megatron/model/build.py")}
        assert module_name(name) in used, f"{name} is imported by none of {before}"


@pytest.mark.parametrize(("files", "lines"), [(11, 1), (2, 951)])
def test_more_is_too_much(tmp_path: Path, files: int, lines: int) -> None:
    names = [f"{number}.py" for number in range(files)]
    for name in names:
        (tmp_path / name).write_text("x = 1\n" * lines)
    assert "shorten one" in (wrong_with(names, tmp_path) or "")
    assert wrong_with(names[:1], tmp_path) is None
    assert wrong_with(["gone.py"], tmp_path) == "not there: ['gone.py']"


def test_the_table_is_found() -> None:
    table = "| file | what |\n|---|---|\n| `a.py` | x |\n| `b/c.py` | `d.py` |\n"
    assert files_in_table(f"\n## Reading order\n\n{table}\n- `e.py`\n\n## Next\n| `f.py` | |\n") == ["a.py", "b/c.py"]
