"""The repository's own Python files, parsed, for tests that read rules off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources(*folders: str) -> list[Path]:
    """Python files of the repository's own code; all of it when no folder is named."""
    everywhere = ("megatron", "tools", "tasks", "tests", "examples", "benchmarks")
    found = [path for folder in folders or everywhere for path in (ROOT / folder).rglob("*.py")]
    return sorted(found + ([] if folders else list(ROOT.glob("*.py"))))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def shown(path: Path, node: ast.AST | None = None) -> str:
    place = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return f"{place}:{node.lineno}" if node is not None else place  # type: ignore[attr-defined]


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every module that a file imports, also inside functions: absolute dotted names, `from a import b` as both a and a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            yield base, node
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)
