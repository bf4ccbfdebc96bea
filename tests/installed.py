"""A package beside this one, installed for the length of a test: one module and its entry points."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from source_files import ROOT


def install(site: Path, module: ModuleType, group: str, entries: Sequence[str]) -> dict[str, str]:
    """Return the environment of a process that finds the package.

    Args:
        site: the folder that it is installed in, which is made.
        module: the package's only one, copied.
        group: of the entry points.
        entries: their lines, such as `muon = toy_optimizers:RULES`.
    """
    name = module.__name__
    about = site / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join((f"[{group}]", *entries, "")))
    (site / f"{name}.py").write_text(Path(str(module.__file__)).read_text())
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
