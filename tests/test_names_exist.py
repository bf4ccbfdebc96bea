"""Names that tests, tools, benchmarks and examples take from the repository's own modules are defined there.

Type checks cover the package alone, and a test that is skipped or slow tells of a renamed function late. This reads the source.
Programs inside strings are read too, as far as they parse.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from source_files import ROOT, shown, sources, tree

FOLDERS = ("tests", "tools", "tasks", "benchmarks", "examples")
SEARCHED = ("tests", "tools", "benchmarks")  # which tests put on sys.path, beside their own folder
SETTERS = {"setattr", "delattr", "object"}  # monkeypatch.setattr(module, "name", ...), patch.object(module, "name")
BY_NAME = {"setattr", "delattr", "patch", "import_module", "find_spec"}  # patch("megatron.a.name")
WITHOUT_MEMBERS = {"object", "ABC", "Protocol", "Generic", "Exception", "ValueError", "RuntimeError", "NamedTuple"}
OTHERS = {  # packages that are not ours; what is neither of these nor Python's own is to be found in the repository
    "hypothesis", "lm_eval", "markdown2", "numpy", "pdoc", "pytest", "safetensors", "sentencepiece", "setuptools",
    "tokenizers", "torch", "transformers", "zstandard",
}  # fmt: skip
INHERITED = {
    "_fields",
    "_replace",
    "_asdict",
    "args",
    "add_note",
    "with_traceback",
    "mro",
}  # from type, exceptions and NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """The module, function or class that a name stands for."""

    path: Path
    node: ast.AST | None = None  # None: the module itself


@dataclass
class Names:
    """The names that one file has bound to modules of the repository and to what is in them."""

    path: Path
    bound: dict[str, Found] = field(default_factory=dict)
    missing: list[tuple[ast.AST, str]] = field(default_factory=list)


@cache
def file_for(module: str, folder: Path) -> Path | None:
    """Return the file of a module of the repository, as a file in `folder` imports it; None for one from elsewhere."""
    parts = module.split(".")
    for root in (ROOT, folder, *(ROOT / name for name in SEARCHED)):
        for path in (root.joinpath(*parts).with_suffix(".py"), root.joinpath(*parts, "__init__.py")):
            if path.is_file():
                return path
    directory = ROOT.joinpath(*parts)
    return directory if parts[0] == "megatron" and directory.is_dir() else None  # a package without an __init__.py


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, and those inside `if`, `try`, `with` and `for`, but none inside functions and classes."""
    for node in body:
        yield node
        if not isinstance(node, Function | ast.ClassDef):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
            yield from inner


def defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement binds."""
    if isinstance(node, Function | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    else:
        yield from (each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))


@cache
def definitions(path: Path) -> dict[str, ast.stmt]:
    """Return the top-level names of a file, each with the statement that binds it."""
    if path.is_dir():
        return {}
    return {name: node for node in statements(tree(path).body) for name in defined(node)}


@cache
def look_up(path: Path, name: str) -> Found | None:
    """Follow a name from a module to what it stands for there, through re-exports; None when the module lacks it."""
    node = definitions(path).get(name)
    if path.is_dir() or path.name == "__init__.py":
        folder = path if path.is_dir() else path.parent
        submodule = file_for(".".join([*folder.relative_to(ROOT).parts, name]), folder)
        if node is None and submodule:
            return Found(submodule)
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        source = file_for(node.module, path.parent)
        original = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), name)
        if source and source != path:
            return look_up(source, original) or Found(path, node)
    return None if node is None else Found(path, node)


@cache
def members(found: Found) -> frozenset[str] | None:
    """Return the attributes of a class and of its instances; None when a base class comes from elsewhere."""
    assert isinstance(found.node, ast.ClassDef)
    names = {name for node in statements(found.node.body) for name in defined(node)}
    names |= {
        each.attr for each in ast.walk(found.node) if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self"
    }
    for base in found.node.bases:
        plain = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        if plain.split(".")[-1] in WITHOUT_MEMBERS:
            continue
        parent = look_up(found.path, plain)
        inherited = members(parent) if parent and isinstance(parent.node, ast.ClassDef) else None
        if inherited is None:
            return None
        names |= inherited
    return frozenset(names)


@cache
def keywords(found: Found) -> frozenset[str] | None:
    """Return the keyword arguments of a function or dataclass; None when any may be given, or when they are not known."""
    node = found.node
    if isinstance(node, ast.ClassDef):
        body = {each.name: each for each in node.body if isinstance(each, Function)}
        if "__init__" in body and not node.bases:
            return keywords(Found(found.path, body["__init__"]))
        plain = all(ast.unparse(base).split("[")[0] in WITHOUT_MEMBERS for base in node.bases)
        made_from_fields = [each for each in node.decorator_list if "dataclass" in ast.unparse(each)]
        made_from_fields += [base for base in node.bases if ast.unparse(base) == "NamedTuple"]
        fields = (each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name))
        return frozenset(fields) if plain and made_from_fields else None
    if isinstance(node, Function) and not node.args.kwarg and not node.decorator_list:
        return frozenset(arg.arg for arg in [*node.args.args, *node.args.kwonlyargs])
    return None


def is_ours(module: str) -> bool:
    """Return whether a module must be one of the repository's."""
    return module.split(".", maxsplit=1)[0] not in OTHERS | sys.stdlib_module_names


def rebound(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the names that a file also uses for something else than an import: parameters, assignments, functions."""
    for node in nodes:
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store):
                yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, Function | ast.ClassDef):
            yield node.name


def bind_imports(nodes: Sequence[ast.AST], names: Names) -> None:
    """Note what the imports of a file bind, and which of them import a name that is not there."""
    folder = names.path.parent
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = file_for(alias.name, folder)
                if path is None and is_ours(alias.name):
                    names.missing.append((node, alias.name))
                elif path and (alias.asname or "." not in alias.name):
                    names.bound[alias.asname or alias.name] = Found(path)
                elif path and alias.name.split(".")[0] == "megatron":  # `import megatron.a` binds `megatron`
                    names.bound["megatron"] = Found(ROOT / "megatron" / "__init__.py")
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            path = file_for(node.module, folder)
            if path is None and is_ours(node.module):
                names.missing.append((node, node.module))
            for alias in node.names if path and path != names.path else ():
                if found := look_up(path, alias.name):
                    names.bound[alias.asname or alias.name] = found
                else:
                    names.missing.append((node, f"{node.module}.{alias.name}"))


def resolve(node: ast.expr, names: Names) -> Found | None:
    """Return what an expression such as `module.Class` stands for, if that is the repository's; note a missing part."""
    if isinstance(node, ast.Name):
        return names.bound.get(node.id)
    if not isinstance(node, ast.Attribute) or not (owner := resolve(node.value, names)):
        return None
    return attribute(node, owner, node.attr, names)


def attribute(node: ast.AST, owner: Found, name: str, names: Names) -> Found | None:
    """Return what `name` of a module or class stands for; note it when it is not defined."""
    if owner.node is None:
        found = look_up(owner.path, name)
        if (
            not found
            and not name.startswith("__")
            and not file_for(name, owner.path if owner.path.is_dir() else owner.path.parent)
        ):
            names.missing.append((node, f"{shown(owner.path)} {name}"))
        return found
    if isinstance(owner.node, ast.ClassDef):
        known = members(owner)
        if known is not None and name not in known | INHERITED and not name.startswith("__"):
            names.missing.append((node, f"{owner.node.name}.{name}"))
        for each in owner.node.body:
            if isinstance(each, Function) and each.name == name:
                return Found(owner.path, each)
    return None


def full_name(node: ast.AST, text: str, names: Names) -> None:
    """Check a dotted name as `patch` takes it: a module, then names in it."""
    parts = text.split(".")
    for length in range(len(parts), 0, -1):
        path = file_for(".".join(parts[:length]), names.path.parent)
        if path and (parts[0] == "megatron" or length < len(parts)):
            found: Found | None = Found(path)
            for name in parts[length:]:
                found = attribute(node, found, name, names) if found else None
            return


def check_call(node: ast.Call, names: Names) -> None:
    """Check the names that stand in a call: its keywords, and those that it replaces by a string."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first, second = [*node.args, None, None][:2]
    if called in SETTERS and first is not None and isinstance(second, ast.Constant) and isinstance(second.value, str):
        if owner := resolve(first, names):
            attribute(node, owner, second.value, names)
    elif called in BY_NAME and isinstance(first, ast.Constant) and isinstance(first.value, str):
        full_name(node, first.value, names)
    accepted = None if not (found := resolve(node.func, names)) or found.node is None else keywords(found)
    for each in node.keywords if accepted is not None else ():
        if each.arg and each.arg not in accepted:
            names.missing.append((node, f"{ast.unparse(node.func)}({each.arg}=)"))


def program_text(node: ast.JoinedStr | ast.Constant) -> ast.Module | None:
    """Return the program that a string holds, if it is one that imports from the package; placeholders become names."""
    if isinstance(node, ast.JoinedStr):
        text = "".join(str(each.value) if isinstance(each, ast.Constant) else "_" for each in node.values)
    else:
        text = str(node.value)
    if "import megatron" not in text and "from megatron" not in text:
        return None
    try:
        return ast.parse(textwrap.dedent(text).strip())
    except SyntaxError:
        return None


def stale(path: Path, module: ast.Module) -> Iterator[str]:
    """Yield the names that a file takes from the repository's modules and that are not defined there, with their place."""
    names, nodes = Names(path), list(ast.walk(module))
    bind_imports(nodes, names)
    for name in rebound(nodes):
        names.bound.pop(name, None)
    inside_strings: set[int] = set()  # the constants of an f-string, which is read as a whole
    for node in nodes:  # outer ones first
        if isinstance(node, ast.Attribute):
            resolve(node, names)
        elif isinstance(node, ast.Call):
            check_call(node, names)
        elif isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in inside_strings:
            if isinstance(node, ast.JoinedStr):
                inside_strings.update(map(id, node.values))
            if program := program_text(node):
                names.missing += [(node, text) for text in stale(path, program)]
    yield from dict.fromkeys(f"{shown(path, node)}: {text}" for node, text in names.missing)


def test_names_taken_from_our_modules_are_defined_there() -> None:
    paths = [*sources(*FOLDERS), *ROOT.glob("*.py")]
    assert not [text for path in paths if path != Path(__file__) for text in stale(path, tree(path))]


BESIDE = Path(__file__).with_name("another_test.py")
STALE = (
    "import megatron.gone",
    "from megatron.gone import thing",
    "from megatron.config import gone",
    "from gone import thing",
    "import gone",
    "from megatron.config.errors import Gone",
    "def test():\n    from source_files import gone",
    "import megatron.config.errors as errors\nerrors.gone",
    "import megatron.config.errors\nmegatron.config.errors.gone",
    "from megatron.config import errors\nmonkeypatch.setattr(errors, 'gone', 1)",
    "monkeypatch.setattr('megatron.config.errors.gone', 1)",
    "with patch('megatron.gone.LIMIT', 1): pass",
    "from unittest import mock\nfrom test_names_exist import Found\nmock.patch.object(Found, 'gone')",
    "from test_names_exist import Found\nFound(path=1, gone=2)",
    "from test_names_exist import stale\nstale(path=1, gone=2)",
    "import test_names_exist as names\nnames.stale(gone=2)",
    "run(f'''\n    import os\n    from megatron.config.errors import Gone\n    Gone({here})\n''')",
)
FRESH = (
    "import megatron, os.path\nos.path.gone\nimport torch.gone",
    "from megatron import config, contract\nfrom megatron.config import errors\nerrors.ConfigError.__name__",
    "from test_names_exist import Found, stale\nFound(path=1).node\nstale(path=1, module=2)\nFound.path",
    "from megatron.config import errors\ndef test(errors):\n    errors.gone",  # another `errors`
    "monkeypatch.setattr('os.gone', 1)\nmonkeypatch.setattr(os, 'gone', 1)",
    "monkeypatch.setattr('megatron.config.errors.ConfigError', 1)",
    "text = 'from megatron we took it'",
)


@pytest.mark.parametrize("text", STALE)
def test_a_stale_name_is_found(text: str) -> None:
    found = list(stale(BESIDE, ast.parse(text)))
    assert len(found) == 1 and ("gone" in found[0] or "Gone" in found[0])


@pytest.mark.parametrize("text", FRESH)
def test_a_name_that_exists_is_no_mistake(text: str) -> None:
    assert not list(stale(BESIDE, ast.parse(text)))
