"""Names in docstrings are those of the code, and every link of the pages that `make docs` builds leads somewhere."""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from source_files import ROOT, shown, sources, tree

sys.path.insert(0, str(ROOT / "tools"))

from build_docs import broken_links

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`")
FILE = re.compile(r"\.(py|toml|md|sh|json|jsonl|idx|bin|txt)$")
ELSEWHERE = {  # names of other programs
    "LABEL_0",
    "TMPDIR",
    "apply_chat_template",
    "fix_query_key_value_ordering",
    "model0",
    "model1",
    "seq_len",
    "validate_args",
}


def docstrings(module: ast.Module) -> Iterator[tuple[ast.AST, ast.Constant]]:
    """Yield what has a docstring, and the docstring."""
    for node in ast.walk(module):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            yield node, statement.value


def names_in_code(module: ast.Module) -> Iterator[str]:
    """Yield every name that a file defines or uses, and the words of its strings, but not those of docstrings."""
    skipped = {id(text) for _, text in docstrings(module)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in skipped:
                yield from re.findall(r"\w+", node.value)
            continue
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield from value.split(".")


def unknown(modules: Iterable[ast.Module], known: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Yield the names between backticks in docstrings that no code has."""
    for module in modules:
        for node, text in docstrings(module):
            for name in NAME.findall(str(text.value)):
                if not FILE.search(name) and name.split(".")[-1] not in known:
                    yield node, name


def test_names_in_docstrings_are_those_of_the_code() -> None:
    modules = {path: tree(path) for path in sources("megatron", "tools", "tasks")}
    known = {name for module in modules.values() for name in names_in_code(module)} | set(dir(builtins))
    known |= {part for path in modules for part in path.relative_to(ROOT).with_suffix("").parts}
    found = {path: [name for _, name in unknown([module], known)] for path, module in modules.items()}
    wrong = [
        f"{shown(path)}: `{name}`" for path, names in found.items() for name in names if name.split(".")[-1] not in ELSEWHERE
    ]
    assert not wrong, f"these were renamed or removed: {wrong}"
    assert {name.split(".")[-1] for names in found.values() for name in names} >= ELSEWHERE, "take out what is no longer named"


def test_a_stale_name_in_a_docstring_is_found() -> None:
    module = ast.parse("def f(a):\n    '''As `f` of `a` and `m.gone`, in `m.f()` and `gone.py`.'''\nx = 'word'\n")
    assert [name for _, name in unknown([module], set(names_in_code(module)))] == ["m.gone"]


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here"></a><a href="b.html#gone"></a><img src="c.svg"><a href="https://x/y"></a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="here"></h1><a href="#gone"></a><a href="a.html"></a>')
    assert list(broken_links(tmp_path)) == [
        "a.html: b.html#gone has no such anchor",
        "a.html: c.svg does not exist",
        "b.html: #gone has no such anchor",
    ]


def test_the_documentation_builds(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="the extra `docs` is not installed")
    command = [os.environ["WARM_PYTHON"], str(ROOT / "tools" / "build_docs.py"), "--output", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    face = (tmp_path / "site" / "api" / "megatron.html").read_text()
    assert 'id="pretrain"' in face and 'id="IndexedDataset"' in face
    assert (tmp_path / "site" / "docs" / "index.html").exists()


def test_a_directory_that_is_no_documentation_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    command = [os.environ["WARM_PYTHON"], str(ROOT / "tools" / "build_docs.py"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is not a built documentation" in done.stderr
    assert (tmp_path / "mine.txt").exists()
