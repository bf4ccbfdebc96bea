"""The suite on several Pythons, one after the other: what `make test-all-pythons` runs.

    python tests/pythons.py                          every Python of this machine that the package supports
    python tests/pythons.py python3.11 python3.13    these

Each has an environment in .venvs/, named by its version. One that fails does not keep the others from running; the table at
the end says how each ended, and the exit status is 1 if any failed. What runs is `make test`, with its variables.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from install import MAX_PYTHON, MIN_PYTHON  # noqa: E402 - a script beside, which is no package


class Interpreter(NamedTuple):
    """A Python that answers: where it is, and its version."""

    path: str
    version: tuple[int, ...]

    @property
    def short(self) -> str:
        return ".".join(map(str, self.version[:2]))


def probe(command: str) -> Interpreter | None:
    """Return the interpreter behind a name or a path; None for one that does not run, as pyenv's place-holders may not."""
    found = shutil.which(command)
    if found is None:
        return None
    program = "import sys; print(*sys.version_info[:3]); print(sys.executable)"
    done = subprocess.run([found, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    version, path = done.stdout.splitlines()
    return Interpreter(path, tuple(map(int, version.split())))


def candidates() -> Iterator[str]:
    """Yield where Pythons may be: names on PATH first, then pyenv's, the newest release of each version first."""
    for minor in range(MIN_PYTHON[1], MAX_PYTHON[1] + 1):
        yield f"python3.{minor}"
    yield "python3"
    places = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    named = [path for path in places.glob("3.*/bin/python3") if path.parts[-3].replace(".", "").isdigit()]
    yield from map(str, sorted(named, key=lambda path: [*map(int, path.parts[-3].split("."))], reverse=True))


def interpreters() -> list[Interpreter]:
    """Return one of each version that the package supports."""
    found: dict[tuple[int, ...], Interpreter] = {}
    for command in candidates():
        python = probe(command)
        if python is not None and MIN_PYTHON <= python.version[:2] <= MAX_PYTHON:
            found.setdefault(python.version[:2], python)
    return [found[version] for version in sorted(found)]


def run_suite(python: Interpreter) -> tuple[str, bool]:
    """Run the suite there, and return how it ended, in words, and whether it passed."""
    print(f"\n== Python {python.short}: {python.path}", flush=True)
    start = time.monotonic()
    make = ["make", "test", f"VENV=.venvs/{python.short}", f"PYTHON={python.path}"]
    status = subprocess.run(make, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    return f"{'passed' if status == 0 else 'FAILED'} after {time.monotonic() - start:.0f} s", status == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="names or paths; by default all that are found")
    named = parser.parse_args(arguments).pythons
    answers = [(name, probe(name)) for name in named] or [(python.path, python) for python in interpreters()]
    if not answers:
        oldest, newest = (".".join(map(str, version)) for version in (MIN_PYTHON, MAX_PYTHON))
        print(f"error: no Python {oldest} to {newest} on PATH or in ~/.pyenv/versions; name one: PYTHONS=...", file=sys.stderr)
        return 2
    rows, passed = [], True
    for name, python in answers:
        words, good = run_suite(python) if python else ("does not run", False)
        rows.append(f"{'.'.join(map(str, python.version)) if python else '-':<8} {words:<20} {name}")
        passed = passed and good
    print("", *rows, sep="\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
