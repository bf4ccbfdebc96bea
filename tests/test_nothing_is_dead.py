"""Every definition of the package is used by some program; one that only tests use belongs to the tests."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from source_files import ROOT, sources, tree

# What no program uses, and why it stands in the package nonetheless.
ALLOWED = {
    "megatron.config.rules.check": "for Python: a configuration without a command line",
    "megatron.data.packed.UnpackedFile.readable": "called by Python's own readers of files",
    "megatron.data.packed._PrependedFile.readable": "called by Python's own readers of files",
    "megatron.files.side.PipedStream.writelines": "part of a stream: whoever is given one may call it",
    "megatron.parallel.collectives.scatter_to": "its reverse, gather_from, is used; the table of collectives is whole",
    "megatron.serving.chat_sandbox.GenerationTag.parse": "called by jinja2",
}

Sources = Mapping[str, ast.Module]  # by the name of the module


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def programs() -> Sources:
    """The package, and everything that is run with it."""
    paths = [*sources("megatron", "tools", "tasks", "benchmarks", "examples"), *ROOT.glob("*.py")]
    return {module_name(path): tree(path) for path in paths}


def assigned(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module gives something to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def read_names(node: ast.stmt) -> Iterator[str]:
    return (name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load))


def used_elsewhere(modules: Sources) -> set[str]:
    """Full names that some file imports, reads off a module that it has imported, or says in a string `module:name`."""
    found: set[str] = set()
    for module in modules.values():
        bound: dict[str, str] = {}
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and node.module:
                bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                bound |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]+:\w+", str(node.value)):
                found.add(str(node.value).replace(":", "."))
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and (base := ast.unparse(node.value)) in bound:
                found.add(f"{bound[base]}.{node.attr}")
    return found


def attributes(modules: Sources) -> set[str]:
    """Names that stand behind a dot in some file, or in a string: what may be a method's or a field's use."""
    nodes = [node for module in modules.values() for node in ast.walk(module)]
    strings = {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    return strings | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def dead(modules: Sources, package: str = "megatron") -> Iterator[str]:
    """Names at the top of a module that nothing uses, and methods whose name stands nowhere behind a dot."""
    elsewhere, behind_a_dot = used_elsewhere(modules), attributes(modules)
    for name, module in modules.items():
        if name.split(".")[0] != package:
            continue
        read = [set(read_names(node)) for node in module.body]
        statements = Counter(own for names in read for own in names)  # how many read a name
        for node, own_reads in zip(module.body, read, strict=True):
            for own in assigned(node):
                beside = statements[own] > (own in own_reads)
                # A constant may be read off a module that stands in a list: `section.RULES`.
                constant = own.isupper() and own in behind_a_dot
                if not (own.startswith("__") or beside or f"{name}.{own}" in elsewhere or constant):
                    yield f"{name}.{own}"
            if isinstance(node, ast.ClassDef):
                methods = [method.name for method in node.body if isinstance(method, ast.FunctionDef)]
                unused = [method for method in methods if not method.startswith("__") and method not in behind_a_dot]
                yield from (f"{name}.{node.name}.{method}" for method in unused)


def test_what_the_package_defines_is_used_by_a_program() -> None:
    found = set(dead(programs()))
    assert not (new := sorted(found - ALLOWED.keys())), f"only tests use these, or nothing: {new}"
    assert not (settled := sorted(ALLOWED.keys() - found)), f"these are used now; take them out of ALLOWED: {settled}"


def test_unused_definitions_are_found() -> None:
    modules = {
        "package.a": ast.parse(
            "LEFT = 1\nREAD = 2\nNAMED = 3\ndef again(n): return again(n - 1)\ndef called(): pass\ndef named(): pass\n"
            "def here(): return called()\nclass ScheduleKind:\n    def run(self): pass\n    def rest(self): pass\n"
        ),
        "package.b": ast.parse("from package import a\nfrom package.a import here\na.READ\nx.NAMED\nx = 'package.a:named'\n"),
        "tools.c": ast.parse("from package.a import ScheduleKind\nScheduleKind().run()\n"),
    }
    assert list(dead(modules, "package")) == ["package.a.LEFT", "package.a.again", "package.a.ScheduleKind.rest"]
