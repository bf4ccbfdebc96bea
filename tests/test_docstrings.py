"""Every public name says what it is: classes, functions, and methods that no base class or protocol has said already."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from source_files import ROOT, shown, sources, tree

NEEDS_NONE = {"main", "forward", "backward"}  # their module or class has said it

Function = ast.FunctionDef | ast.AsyncFunctionDef
Classes = Mapping[str, list[ast.ClassDef]]  # by name


def classes_by_name(modules: Iterable[ast.Module]) -> Classes:
    found: dict[str, list[ast.ClassDef]] = defaultdict(list)
    for module in modules:
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(node)
    return found


def named_bases(node: ast.ClassDef) -> Iterator[str]:
    for base in node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base  # Generic[T] -> Generic
        yield ast.unparse(plain).split(".")[-1]


def all_bases(node: ast.ClassDef, classes: Classes) -> Iterator[ast.ClassDef]:
    for base in (found for name in named_bases(node) for found in classes.get(name, ()) if found is not node):
        yield base
        yield from all_bases(base, classes)


def methods(node: ast.ClassDef) -> list[Function]:
    """The methods of a class, without setters, whose property has been explained."""
    found = [method for method in node.body if isinstance(method, Function)]
    return [method for method in found if not any(ast.unparse(name).endswith(".setter") for name in method.decorator_list)]


def explained(nodes: Iterable[ast.ClassDef]) -> set[str]:
    """The methods that have docstrings in some of these classes."""
    return {method.name for node in nodes for method in methods(node) if ast.get_docstring(method)}


def is_stub(method: Function) -> bool:
    """Return whether a method is declared alone, as those of a protocol are, whose docstring stands at the class."""
    last = method.body[-1]
    return len(method.body) == 1 and isinstance(last, ast.Expr) and ast.unparse(last) == "..."


def silent(module: ast.Module, classes: Classes) -> Iterator[str]:
    """The public names at the top of a module, and methods of its classes, that have no docstring and need one."""
    protocols = [node for same in classes.values() for node in same if "Protocol" in named_bases(node)]
    for node in module.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node) and node.name not in NEEDS_NONE:
            yield node.name
        if isinstance(node, ast.ClassDef):
            known = NEEDS_NONE | explained(all_bases(node, classes)) | explained(protocols)
            for method in methods(node):
                if not (method.name.startswith("_") or ast.get_docstring(method) or method.name in known or is_stub(method)):
                    yield f"{node.name}.{method.name}"


def test_public_names_say_what_they_are() -> None:
    paths = [*sources("megatron", "tools", "tasks", "benchmarks", "examples"), *ROOT.glob("*.py")]
    modules = {shown(path): tree(path) for path in paths}
    classes = classes_by_name(modules.values())
    found = {f"{place}: {name}" for place, module in modules.items() for name in silent(module, classes)}
    assert not found, f"these have no docstring: {sorted(found)}"


def test_the_names_without_a_docstring_are_found() -> None:
    module = ast.parse(
        "def f(): pass\nasync def g(): pass\ndef _own(): pass\ndef main(): pass\nclass C:\n    def m(self): pass\n"
        "class P(Protocol):\n    'Says it.'\n    def stub(self): ...\n    def asked(self):\n        'Says it.'\n"
        "class B:\n    'Says it.'\n    def step(self):\n        'Says it.'\n"
        "class D(B):\n    'Says it.'\n    def step(self): pass\n    def asked(self): pass\n    def new(self): pass\n"
        "    @property\n    def size(self):\n        'Says it.'\n    @size.setter\n    def size(self, value): pass\n"
    )
    assert list(silent(module, classes_by_name([module]))) == ["f", "g", "C", "C.m", "D.new"]
