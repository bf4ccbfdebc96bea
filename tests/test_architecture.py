"""The rules of ARCHITECTURE.md, read off the source with `ast`: floors and no hidden state."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import source_files
from source_files import ROOT, imports, shown, sources, tree

PACKAGE = ROOT / "megatron"

# The rooms of the package, floor by floor, each with the rooms that it may import: on floors below, or named on its own.
LOWEST = {"files", "pipeline.schedules"}
GROUND = LOWEST | {"config", "contract", "launch", "mesh"}
BETWEEN = GROUND | {"parallel", "data", "pipeline", "optim", "checkpoint", "model", "plan"}
UPPER = BETWEEN | {"inference", "train"}
FLOORS: list[dict[str, set[str]]] = [
    {"files": set(), "pipeline.schedules": set()},
    {"launch": {"files"}, "config": LOWEST, "contract": set(), "mesh": {"files", "launch", "config"}},
    {"parallel": GROUND, "data": GROUND},
    {name: GROUND | {"parallel"} for name in ("model", "pipeline", "optim")} | {"checkpoint": GROUND | {"parallel", "data"}},
    {"plan": GROUND | {"parallel", "pipeline", "model"}},
    {"inference": BETWEEN, "train": BETWEEN | {"inference"}},
    {"interop": UPPER, "tasks": UPPER, "serving": UPPER},
    {"cli": UPPER | {"tasks"}},
]
ROOMS = {room: allowed for floor in FLOORS for room, allowed in floor.items()}
LOOSE = {"__init__", "contract"}  # files in the package's root
# Files and packages that import no torch: they are tested in milliseconds and run anywhere.
PURE = [
    *(
        "files",
        "config",
        "mesh/grid.py",
        "data/sample_index.py",
        "data/sentence_index.py",
        "data/masking.py",
        "data/indexed.py",
    ),
    *("checkpoint/shards.py", "parallel/buckets.py", "serving/stops.py"),
]
PURE += [
    f"launch/{name}.py"
    for name in (
        *(
            "command_line",
            "entry",
            "environment",
            "errors",
            "exit_report",
            "heartbeat",
            "memory",
            "packages",
            "phase",
            "signals",
        ),
        "status_file",
    )
]
PURE += ["plan/state_size.py"]
PURE += [f"optim/{name}.py" for name in ("lr", "scaler", "sharding")]
PURE += [f"tasks/{name}.py" for name in ("windows", "wikitext")]
PURE += [f"train/{name}.py" for name in ("interrupt", "lock", "progress", "wandb_link", "wandb_run", "wandb_writer")]
OPTIONAL = {"apex", "transformer_engine", "flash_attn", "wandb", "tensorboard", "transformers", "lm_eval"}
OPTIONAL |= {"starlette", "uvicorn"}


def without_package(module: str) -> str:
    """`megatron.plan.size` -> `plan.size`."""
    return module.removeprefix("megatron").removeprefix(".")


def innermost_room(place: str) -> str:
    """`pipeline.schedules.draw` -> `pipeline.schedules`: the innermost room that a module is in."""
    return max((room for room in ROOMS if f"{place}.".startswith(f"{room}.")), key=len, default=place)


def floor_violations(path: Path, allowed: set[str], own: str) -> list[str]:
    wrong = []
    for module, node in imports(path):
        if module != "megatron" and not module.startswith("megatron."):
            continue
        place = without_package(module)
        if place in ("", "__version__") or innermost_room(place) in {own, *allowed}:
            continue
        wrong.append(f"{shown(path, node)} imports {module}, which {own} may not")
    return wrong


def files_in_room(room: str) -> list[Path]:
    """The files of a room without those of a room inside it."""
    place = PACKAGE / room.replace(".", "/")
    files = sorted(place.rglob("*.py")) or [place.with_suffix(".py")]
    return [path for path in files if innermost_room(".".join(path.relative_to(PACKAGE).with_suffix("").parts)) == room]


def test_every_package_has_a_floor() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    homeless = sorted(folders - ROOMS.keys())
    assert not homeless, f"give these a floor in tests/test_architecture.py: {homeless}"
    loose = sorted({p.stem for p in PACKAGE.glob("*.py")} - LOOSE)
    assert not loose, f"these lie in the package's root; give them a room: {loose}"


def test_no_arrow_leads_up_a_floor_or_in_a_circle() -> None:
    below: set[str] = set()
    for floor in FLOORS:
        for room, allowed in floor.items():
            assert allowed <= below | floor.keys(), f"{room} imports from above: {sorted(allowed - below - floor.keys())}"
        for room, allowed in floor.items():
            beside = allowed & floor.keys()
            assert not any(room in floor[other] for other in beside), f"{room} and {sorted(beside)} import each other"
        below |= floor.keys()


@pytest.mark.parametrize("package", sorted(ROOMS))
def test_imports_go_down_the_floors(package: str) -> None:
    files = files_in_room(package)
    assert files, package
    wrong = [line for path in files for line in floor_violations(path, ROOMS[package], package)]
    assert not wrong, "\n".join(wrong)


def test_the_floor_test_notices_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "ROOT", tmp_path)
    bad = tmp_path / "megatron" / "data" / "bad.py"
    bad.parent.mkdir(parents=True)
    for line in (
        "import megatron.model.gpt",
        "from megatron.optim import lr",
        "from megatron import model",
        "from megatron import pipeline",
        "from ..model import gpt",
    ):
        bad.write_text(f"def f():\n    {line}\n")
        assert floor_violations(bad, ROOMS["data"], "data"), line
    for line in (
        "import torch",
        "from megatron.launch.packages import install_command",
        "from . import gpt",
        "from megatron import __version__",
    ):
        bad.write_text(f"def f():\n    {line}\n")
        assert not floor_violations(bad, ROOMS["data"], "data"), line
    bad.write_text("from megatron.pipeline.schedules.schedule import make_schedule\n")
    assert not floor_violations(bad, ROOMS["config"], "config")
    bad.write_text("from megatron.pipeline.executor import Executor\n")
    assert floor_violations(bad, ROOMS["config"], "config")


def test_the_model_knows_one_axis_and_no_mesh() -> None:
    wrong = [
        shown(path, node)
        for path in (PACKAGE / "model").rglob("*.py")
        for module, node in imports(path)
        if module.split(".")[-1] == "Mesh" or module.startswith("torch.distributed")
    ]
    assert not wrong, wrong


def test_no_import_cycles() -> None:
    files = {"megatron." + ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sources("megatron")}
    graph = {name: sorted({m for m, _ in imports(path) if m in files and m != name}) for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for following in graph[name]:
                visit(following, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_entry_scripts_and_tools_do_not_import_each_other() -> None:
    scripts = [*ROOT.glob("pretrain_*.py"), *sources("tools")]
    names = {p.stem for p in scripts} | {"tools"}
    wrong = [f"{shown(p, node)} imports {m}" for p in scripts for m, node in imports(p) if m.split(".")[0] in names]
    assert not wrong, wrong


def pure_files() -> list[Path]:
    named = [PACKAGE / entry for entry in PURE]
    return sorted(f for path in named for f in (path.rglob("*.py") if path.is_dir() else [path]))


def test_the_list_of_pure_files_names_each_once_and_none_that_is_gone() -> None:
    gone = [entry for entry in PURE if not (PACKAGE / entry).exists()]
    assert not gone, f"take these out of PURE: {gone}"
    counted = Counter(pure_files())
    assert not (twice := [shown(path) for path, count in counted.items() if count > 1]), f"these stand in PURE twice: {twice}"


def test_pure_files_import_no_torch() -> None:
    wrong = [f"{shown(p, node)} imports {m}" for p in pure_files() for m, node in imports(p) if m.split(".")[0] == "torch"]
    assert not wrong, wrong


def loaded_by(*modules: str) -> set[str]:
    """Top-level names in sys.modules after a fresh interpreter without a GPU imported `modules`."""
    code = f"import sys\nimport {', '.join(modules)}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert not loaded_by("megatron") & {"torch", "numpy", *OPTIONAL}


def test_the_configuration_loads_without_torch() -> None:
    files = sorted((PACKAGE / "config").rglob("*.py"))
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files if p.stem != "__init__"]
    assert modules
    assert "torch" not in loaded_by(*modules)


def test_every_module_loads_without_gpu_and_optional_packages() -> None:
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in sources("megatron")]
    loaded = loaded_by(*modules)
    assert "torch" in loaded
    assert not loaded & OPTIONAL, loaded & OPTIONAL


def test_no_global_statement() -> None:
    wrong = [shown(p, n) for p in sources() for n in ast.walk(tree(p)) if isinstance(n, ast.Global)]
    assert not wrong, wrong


CONTAINERS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {
    "list",
    "dict",
    "set",
    "defaultdict",
    "deque",
    "Counter",
    "OrderedDict",
    "WeakKeyDictionary",
    "local",
    "ContextVar",
}
MUTATORS = {
    "append",
    "extend",
    "add",
    "update",
    "insert",
    "pop",
    "popitem",
    "clear",
    "remove",
    "discard",
    "setdefault",
    "appendleft",
}


def module_state(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield the state that a module keeps between calls: containers that its functions change, and process groups."""
    containers: set[str] = set()
    for node in module.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) or node.value is None:
            continue
        names = {t.id for t in (node.targets if isinstance(node, ast.Assign) else [node.target]) if isinstance(t, ast.Name)}
        value = node.value
        called = value.func if isinstance(value, ast.Call) else None
        called_name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        if isinstance(value, CONTAINERS) or called_name in MUTABLE_CALLS:
            containers |= names
        if called_name in {"new_group", "init_process_group", "init_device_mesh", "ContextVar", "local"}:
            yield f"module-level {called_name}()", node
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                target: ast.AST = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                target = node.value
            else:
                continue
            if isinstance(target, ast.Name) and target.id in containers - bound_in(function):
                yield f"{target.id} is changed by a function", node


def bound_in(function: ast.AST) -> set[str]:
    """Names that a function binds itself, so that they are not the module's."""
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}


def test_no_module_level_state() -> None:
    wrong = [f"{shown(p, node)}: {what}" for p in sources("megatron", "tools", "tasks") for what, node in module_state(tree(p))]
    assert not wrong, "\n".join(wrong)


def test_the_state_test_notices_what_it_should() -> None:
    bad = [
        "X = {}\ndef f(): X['a'] = 1",
        "X = []\ndef f(): X.append(1)",
        "import d\nG = d.new_group([0])",
        "X = dict()\ndef f(): del X[1]",
    ]
    good = [
        "X = {'a': 1}\ndef f(): return X['a']",
        "X = []\ndef f():\n    X = []\n    X.append(1)",
        "def f():\n    x = {}\n    x[1] = 2",
    ]
    assert all(list(module_state(ast.parse(code))) for code in bad)
    assert not any(list(module_state(ast.parse(code))) for code in good)


def test_no_file_is_called_utils_or_helpers() -> None:
    wrong = [shown(p) for p in sources() if re.fullmatch(r"_?(utils?|helpers?|commons?|misc)", p.stem)]
    assert not wrong, wrong


def test_no_assertions_outside_tests() -> None:
    wrong = [
        shown(p, n)
        for p in [*sources("megatron", "tools", "tasks"), *ROOT.glob("pretrain_*.py")]
        for n in ast.walk(tree(p))
        if isinstance(n, ast.Assert)
    ]
    assert not wrong, f"raise an error that says what to do instead: {wrong}"


def test_public_modules_say_what_they_are() -> None:
    wrong = [shown(p) for p in sources("megatron", "tools", "benchmarks", "examples") if not ast.get_docstring(tree(p))]
    assert not wrong, wrong
