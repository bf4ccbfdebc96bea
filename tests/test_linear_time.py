"""Every regular expression of the package, and what else reads text of any length, on long inputs that are all alike.

The bound is of processor time, a hundred times what linear work needs. Quadratic work takes a multiple of it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SIZES = (300, 3000, 80_000)  # the first two find what is worse than quadratic before it takes for ever
SECONDS = 1.0  # of processor time for one input
READ_BY = {"compile", "match", "search", "fullmatch", "split", "findall", "finditer", "sub", "subn"}
# Expressions that are put together while the program runs, and one that stands for each.
KNOWN_TOKENS = "'(' + '|'.join(map(re.escape, self._added)) + ')'"
BUILT = {
    ("megatron/data/sentence_piece.py", KNOWN_TOKENS): r"(<CLS>|<EOD>|<extra_id_0>)",
    ("megatron/data/special_tokens.py", "'|'.join(map(re.escape, longest_first))"): r"<\|endoftext\|>|<\|im_end\|>|<EOD>",
    ("megatron/files/foreign.py", "pattern"): (
        r"(model|pytorch_model|tf_model|flax_model)[\w.-]*\.(safetensors|bin|h5|msgpack)(\.index\.json)?"
    ),
    ("megatron/files/prefixes.py", "re.escape(name) + '_.+_(document|sentence)' if name else '.*'"): (
        r"corpus_.+_(document|sentence)"
    ),
    ("tools/install.py", "re.escape(project['name']) + '\\\\[(.*)\\\\]'"): r"megatron\-plain\[(.*)\]",
    ("megatron/files/pending.py", "re.escape(path.name) + TEMPORARY"): r"vocab\.txt\.\d+(-[0-9a-f]{8})?\.tmp",
    (
        "megatron/launch/status_file.py",
        "re.escape(_name(own).rsplit('-', 2)[0]) + '-(\\\\d+)-(\\\\d+)'",
    ): r"slate\-0123456789ab-(\d+)-(\d+)",
}
# Where a class or a category is meant, these stand for it.
SAMPLES = "a0 \n."


def sources() -> list[Path]:
    return sorted(p for top in ("megatron", "tools", "tasks") for p in (ROOT / top).rglob("*.py")) + sorted(ROOT.glob("*.py"))


def expressions() -> Iterator[tuple[str, str, str]]:
    """(file, expression, how it is used) of every call of re."""
    for path in sources():
        name = str(path.relative_to(ROOT))
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            place = call.func
            of_re = isinstance(place, ast.Attribute) and isinstance(place.value, ast.Name) and place.value.id == "re"
            if of_re and place.attr in READ_BY:
                yield name, value(name, call.args[0]), place.attr


def value(name: str, argument: ast.expr) -> str:
    text = ast.unparse(argument)
    if (name, text) in BUILT:
        return BUILT[name, text]
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    try:
        return str(eval(compile(ast.Expression(argument), name, "eval"), vars(module)))
    except NameError as error:
        raise AssertionError(f"{name}: {text} is made while the program runs: give an example of it in BUILT") from error


def characters(expression: str) -> list[str]:
    """Characters that the expression speaks of, and some that it may mean."""
    own = re.sub(r"\\[a-zA-Z]|\(\?[:=!<P]+(\w+>)?", "", expression)
    return sorted({c for c in own if c not in "\\()[]{}*+?|^$"} | set(re.findall(r"\\([][(){}.*+?|^$\\])", own)))


def inputs(own: list[str], size: int) -> Iterator[str]:
    """Runs of each character and of pairs, alone and between others that keep them from matching."""
    several = [*dict.fromkeys([*own[:: max(1, len(own) // 5)][:5], *SAMPLES])]
    for c in several:
        yield c * size
        yield f"({c * size}\0"
        yield f".{c * size}\0a"
    for a, b in itertools.permutations(several[:5], 2):
        yield (a + b) * (size // 2)


def check(
    work: Callable[[str], object], own: list[str], what: str, sizes: Sequence[int] = SIZES, bound: float = SECONDS
) -> None:
    for size in sizes:
        for text in inputs(own, size):
            start = time.process_time()
            work(text)
            took = time.process_time() - start
            assert took < bound, f"{what}: {took:.1f} s for {size} characters like {text[:12]!r}...{text[-4:]!r}"


def test_every_regular_expression_takes_linear_time() -> None:
    found = sorted(set(expressions()))
    assert len(found) > 25
    for name, expression, how in found:
        pattern = re.compile(expression)
        if how not in ("match", "fullmatch"):
            check(functools.partial(pattern.sub, ""), characters(expression), f"{name}: {expression}")
        if how in ("match", "fullmatch", "compile"):
            check(pattern.fullmatch, characters(expression), f"{name}: {expression}")


def test_the_sweep_sees_a_slow_one() -> None:
    """These stood in the package once: a run of white space, a list of hosts, a pair of brackets, a last word."""
    for slow in (r"\s*\n\s*\n\s*", r"[^,\[]+(?:\[[^\]]*\])?[^,\[]*", r"\(\s*([^)]*?)\s*\)", r"([\w.]+)\.$"):
        with pytest.raises(AssertionError, match=r"s for \d+ characters"):
            check(functools.partial(re.compile(slow).sub, ""), characters(slow), slow, (100, 1000, 20_000, 60_000), 0.1)


def functions() -> dict[str, Callable[[str], Any]]:
    from megatron.config.command_line.spelling import did_you_mean, known_flags
    from megatron.data.corpus import Line, parse_line
    from megatron.data.fast_cuts import RUN, alternatives
    from megatron.data.sentences import split_sentences
    from megatron.launch.environment import expand_hosts
    from megatron.serving.stops import StopScan, StopTexts
    from megatron.tasks.squad import normalize_answer, word_f1
    from megatron.tasks.tagging import entities
    from megatron.tasks.wikitext import detokenize

    flags = known_flags()

    def line(text: str) -> object:
        return parse_line(
            Line("f", 1, b'{"text": "' + "".join(c for c in text if c not in '"\\\0\n').encode() + b'"}'), ["text"]
        )

    return {
        "sentences": lambda text: list(split_sentences(text)),
        "abbreviations": lambda text: list(split_sentences(text[:15_000].replace("a", "A. ").replace("0", "Mr. X. "))),
        "wikitext": detokenize,
        "line of a corpus": line,
        "flag": lambda text: did_you_mean("--" + text[:15_000], flags),
        "stop": lambda text: StopScan(StopTexts([text[1:20_000] + "!", text[:10_000]])).read(text[:20_000]),
        "normalized": normalize_answer,
        "overlap": lambda text: word_f1(text, text[::-1]),
        "tags": lambda text: list(entities(text[:15_000])),
        "alternatives": lambda text: list(alternatives(text)),
        "run": RUN.fullmatch,
        "hosts": lambda text: expand_hosts(text.replace("-", "")) if "[" not in text else None,
    }


@pytest.mark.parametrize("name", sorted(functions()))
def test_functions_take_linear_time(name: str) -> None:
    check(functions()[name], list("('[A"), name)
