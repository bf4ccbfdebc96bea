"""The words of the code: how docstrings begin, who explains its parameters, how much is commented, which names stand twice.

python tests/test_words.py [megatron/config ...]      lists what the measures find, and their figures
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from source_files import shown, sources, tree

NOT_A_SENTENCE = re.compile(r"(What|Whether|How|Of|Where)\b")
SECTION = re.compile(r"^\s*Args:$", re.MULTILINE)
FOR_TOOLS = re.compile(r"#\s*(type:|noqa|fmt:|pragma|ruff)")
CONSTANT = re.compile(r"\b(MOST|FEWEST|LONGEST)_[A-Z_]+\b")
MANY_PARAMETERS = 3

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a file, private names included."""
    for node in ast.walk(module):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def no_sentences(module: ast.Module) -> Iterator[tuple[int, str]]:
    """The docstrings that begin as an indirect question does, or with an attribute, in place of a sentence."""
    return ((line, text.splitlines()[0]) for line, text in docstrings(module) if NOT_A_SENTENCE.match(text))


def public_functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Name and node of the public functions at the top of a file, and of the public methods of its public classes."""
    for node in module.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, FUNCTIONS) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names that a caller passes."""
    a = function.args
    names = [arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs]]
    return [name for name in names if name not in ("self", "cls", "ctx")]


def with_many_parameters(module: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line, name, and whether it explains them, of each public function of three parameters or more.

    A method without a docstring is left out: its base class has explained it, which tests/test_docstrings.py checks.
    """
    for name, function in public_functions(module):
        text = ast.get_docstring(function)
        if text and len(parameters(function)) >= MANY_PARAMETERS:
            yield function.lineno, name, bool(SECTION.search(text))


def attributes_as_functions(module: ast.Module) -> list[str]:
    """Return the functions called `x_of`, which a verb or `x_from_y` says better."""
    return [node.name for node in ast.walk(module) if isinstance(node, FUNCTIONS) and re.fullmatch(r"(\w+_)?of", node.name)]


def comments_and_code(text: str, module: ast.Module) -> tuple[int, int]:
    """Count the comments for readers, those at the end of a line too, and the lines of code; a docstring is neither."""
    comments, code = 0, set[int]()
    skip = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments += not FOR_TOOLS.match(token.string)
        elif token.type not in skip:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            text_node = node.body[0]
            code.difference_update(range(text_node.lineno, (text_node.end_lineno or 0) + 1))
    return comments, len(code)


def public_classes(modules: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """The files of each public class name, for those that stand in two or more."""
    found: dict[str, list[str]] = defaultdict(list)
    for place, module in modules.items():
        for node in module.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(place)
    return {name: places for name, places in found.items() if len(places) > 1}


def package() -> dict[str, ast.Module]:
    return {shown(path): tree(path) for path in sources("megatron")}


def test_docstrings_begin_with_sentences() -> None:
    found = [f"{place}:{line}: {text}" for place, module in package().items() for line, text in no_sentences(module)]
    everything = sum(1 for module in package().values() for _ in docstrings(module))
    assert len(found) < 0.01 * everything, found


def test_parameters_are_explained() -> None:
    found = [(place, *rest) for place, module in package().items() for rest in with_many_parameters(module)]
    silent = [f"{place}:{line}: {name}" for place, line, name, explained in found if not explained]
    assert len(silent) <= 0.1 * len(found), silent


def test_comments_say_why() -> None:
    pairs = [comments_and_code(path.read_text(), tree(path)) for path in sources("megatron")]
    comments, code = (sum(column) for column in zip(*pairs, strict=True))
    assert comments >= 0.05 * code, f"{comments} comments on {code} lines of code"


def test_tests_and_benchmarks_keep_the_same_rules() -> None:
    """Docstrings are sentences, and support modules explain their parameters."""
    paths = sources("tests", "benchmarks", "examples")
    assert not [f"{shown(path)}:{line}: {text}" for path in paths for line, text in no_sentences(tree(path))]
    support = [path for path in paths if not path.name.startswith("test_")]
    found = [(shown(path), *rest) for path in support for rest in with_many_parameters(tree(path))]
    silent = [f"{place}:{line}: {name}" for place, line, name, explained in found if not explained]
    assert len(silent) <= 0.1 * len(found), silent


def test_no_function_is_called_as_an_attribute_of_something() -> None:
    assert not [f"{shown(path)}: {name}" for path in sources() for name in attributes_as_functions(tree(path))]


def test_a_class_name_has_one_meaning() -> None:
    assert public_classes(package()) == {}


def test_limits_are_called_max_and_min() -> None:
    paths = [
        path for path in sources("megatron", "tools", "tasks", "tests", "benchmarks", "examples") if path != Path(__file__)
    ]
    assert not [f"{shown(path)}: {name.group()}" for path in paths for name in CONSTANT.finditer(path.read_text())]


def test_what_breaks_the_rules_is_found() -> None:
    text = (
        '"""How it is."""\nX = 1  # why\n# type: ignore\n# Another.\n'
        'def f(a, b, *, c):\n    """Add.\n\n    Args:\n        a: one\n    """\n    return (a +\n            b)\n'
        'def g(a, b, c):\n    """Of a."""\nclass C:\n    def h(self, a, b):\n        """Do."""\n'
        '    def i(self, a, b, c):\n        """Do."""\n    def j(self, a, b, c): pass\nclass _D: pass\n'
    )
    module = ast.parse(text)
    assert list(no_sentences(module)) == [(1, "How it is."), (13, "Of a.")]
    assert [(name, explained) for _, name, explained in with_many_parameters(module)] == [
        ("f", True),
        ("g", False),
        ("C.i", False),
    ]
    assert attributes_as_functions(ast.parse("def size_of(x): pass\ndef of(x): pass\ndef often(): pass")) == ["size_of", "of"]
    assert comments_and_code(text, module) == (2, 10)
    assert public_classes({"a.py": module, "b.py": module}) == {"C": ["a.py", "b.py"]}
    assert CONSTANT.findall("MOST_LINES, FEWEST_RANKS, ALMOST_THERE") == ["MOST", "FEWEST"]


def report(places: Iterable[str]) -> None:
    """Print what the measures find in these directories, and the figures."""
    everything = many = explained = comments = code = opened = 0
    for path in sources(*places):
        module = tree(path)
        for line, text in no_sentences(module):
            opened += 1
            print(f"{shown(path)}:{line}: begins with no sentence: {text}")
        for line, name, says in with_many_parameters(module):
            many, explained = many + 1, explained + says
            if not says:
                print(f"{shown(path)}:{line}: {name} has no Args")
        everything += sum(1 for _ in docstrings(module))
        pair = comments_and_code(path.read_text(), module)
        comments, code = comments + pair[0], code + pair[1]
    for name, twice in public_classes(package()).items():
        print(f"class {name} stands in {', '.join(twice)}")
    print(f"{opened} of {everything} docstrings begin with no sentence: {opened / everything:.1%}")
    print(f"{explained} of {many} public functions of more than two parameters explain them: {explained / max(1, many):.0%}")
    print(f"{comments} comments on {code} lines of code: {100 * comments / code:.1f} on 100")


if __name__ == "__main__":
    report(sys.argv[1:] or ["megatron"])
