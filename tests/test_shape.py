"""Limits on the size of the code's pieces: lines of a file, lines and branches of a function, and lists of arguments.

Each rule finds what breaks it in one parsed file.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from source_files import ROOT, shown, sources, tree

MAX_LINES = 400
REASON = "Longer than 400 lines because"
MAX_FUNCTION_LINES = 60
MAX_BRANCHES = 20
MAX_POSITIONAL_PARAMETERS = 6  # without self and cls
MAX_POSITIONAL_ARGUMENTS = 8

TEXTS = (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)

Found = Iterator[tuple[str, str]]  # the name of what is too large, and how large it is


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, also those inside of others, which count for both."""
    return (node for node in ast.walk(module) if isinstance(node, FUNCTIONS))


def branches(function: ast.AST) -> int:
    """Places where the way through a function forks: conditions, loops, handlers, and each further operand of and, or."""
    forks = 0
    for node in ast.walk(function):
        forks += isinstance(node, BRANCHES)
        forks += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
    return forks


def long_files(module: ast.Module, lines: int) -> Found:
    if lines > MAX_LINES and REASON not in (ast.get_docstring(module) or ""):
        yield "file", f"{lines} lines; cut it, or begin a sentence of its docstring with '{REASON}'"


def long_functions(module: ast.Module, lines: int) -> Found:
    for function in functions(module):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield function.name, f"{length} lines"


def branching_functions(module: ast.Module, lines: int) -> Found:
    for function in functions(module):
        if (count := branches(function)) > MAX_BRANCHES:
            yield function.name, f"{count} branches"


def is_autograd(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether it is the forward pass of an autograd function, which PyTorch gives positional arguments alone."""
    return function.name == "forward" and [arg.arg for arg in function.args.args[:1]] == ["ctx"]


def many_parameters(module: ast.Module, lines: int) -> Found:
    for function in functions(module):
        names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
        count = len(names[1:] if names[:1] in (["self"], ["cls"]) else names)
        if count > MAX_POSITIONAL_PARAMETERS and not is_autograd(function):
            yield function.name, f"{count} positional parameters; let the last ones be named, or give them a type"


def many_arguments(module: ast.Module, lines: int) -> Found:
    for call in ast.walk(module):
        if not isinstance(call, ast.Call) or len(call.args) <= MAX_POSITIONAL_ARGUMENTS:
            continue
        if isinstance(call.func, ast.Attribute) and call.func.attr == "apply":
            continue  # of an autograd function
        yield ast.unparse(call.func), f"a call with {len(call.args)} positional arguments; name them"


def conditions_as_numbers(module: ast.Module, lines: int) -> Found:
    """Text or lists that a condition multiplies, and conditions as an index: shorter to write than `if`, not to read."""
    for node in ast.walk(module):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = (node.left, node.right)
            clever = any(isinstance(side, TEXTS) for side in sides) and any(is_condition(side) for side in sides)
        else:
            clever = isinstance(node, ast.Subscript) and any(map(is_condition, index_parts(node.slice)))
        if clever:
            yield ast.unparse(node), "a condition as a number; write `if`"


def is_condition(node: ast.AST | None) -> bool:
    if isinstance(node, ast.BoolOp | ast.UnaryOp):
        return isinstance(node.op, ast.And | ast.Not)  # `x or default` is a value
    return isinstance(node, ast.Compare) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "bool")


def index_parts(index: ast.expr) -> tuple[ast.AST | None, ...]:
    return (index.lower, index.upper) if isinstance(index, ast.Slice) else (index,)


@dataclass(frozen=True)
class Rule:
    """find: what breaks the rule. bad, good: sources that do and do not, at the limit."""

    find: Callable[[ast.Module, int], Found]
    bad: str
    good: str


def function_with_lines(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


def function_with(expression: str) -> str:
    return f"def f(x):\n    return {expression}\n"


RULES = {
    "lines of a file": Rule(long_files, "x = 1\n" * 401, f'"""A table. {REASON} it is one."""\n' + "x = 1\n" * 401),
    "lines of a function": Rule(long_functions, function_with_lines(61), function_with_lines(60)),
    "branches of a function": Rule(
        branching_functions,
        function_with(" or ".join(["x"] * 22)),
        function_with(" or ".join(["x"] * 21)),
    ),
    "positional parameters": Rule(
        many_parameters,
        "class A:\n    def f(self, a, b, c, d, e, f, g): ...\n",
        "class A:\n    def f(self, a, b, c, d, e, f, *, g): ...\n    def forward(ctx, a, b, c, d, e, f, g): ...\n",
    ),
    "conditions as numbers": Rule(
        conditions_as_numbers,
        "x = 's' * (n > 1)\n",
        "x = 's' if n > 1 else ''\ny = loss * (place == 0)\nz = TABLE[name or 'usual']\n",
    ),
    "positional arguments": Rule(many_arguments, "f(1, 2, 3, 4, 5, 6, 7, 8, 9)", "f(1, 2, 3, 4, 5, 6, 7, 8, i=9)"),
}


def program_files(rule: Rule) -> list[Path]:
    """The files of programs and package; of the tests too where a file's length is the matter."""
    folders = () if rule.find is long_files else ("megatron", "tools", "tasks", "benchmarks", "examples")
    return [*sources(*folders), *(ROOT.glob("*.py") if folders else ())]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_no_piece_is_too_large(rule: Rule) -> None:
    wrong = [
        f"{shown(path)}: {name}: {what}"
        for path in program_files(rule)
        for name, what in rule.find(tree(path), len(path.read_text(encoding="utf-8").splitlines()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_rule_finds_what_is_over_the_limit_and_nothing_else(rule: Rule) -> None:
    assert list(rule.find(ast.parse(rule.bad), len(rule.bad.splitlines())))
    assert not list(rule.find(ast.parse(rule.good), len(rule.good.splitlines())))


@pytest.mark.parametrize(
    "source", ["x[a == b]", "x[not a]", "x[a and b]", "x[: a > 1]", "x[bool(a)]", "x = [1] * (not a)", "x = f'{a}' * (a > b)"]
)
def test_conditions_as_numbers_are_found(source: str) -> None:
    assert list(conditions_as_numbers(ast.parse(source), 1))


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("if x:\n    pass\nelif y:\n    pass\nelse:\n    pass", 2),
        ("for a in b:\n    pass\nwhile c:\n    pass", 2),
        ("async def f():\n    async for a in b:\n        pass", 1),
        ("try:\n    pass\nexcept A:\n    pass\nexcept B:\n    pass", 2),
        ("x = [a for b in c for d in e if f]", 2),
        ("x = a if b else c", 1),
        ("x = a and b and c or d", 3),
        ("match x:\n    case 1:\n        pass\n    case _:\n        pass", 2),
        ("def f():\n    def g():\n        if x:\n            pass", 1),
        ("x = 1", 0),
    ],
)
def test_branches_are_counted(source: str, count: int) -> None:
    assert branches(ast.parse(source)) == count
