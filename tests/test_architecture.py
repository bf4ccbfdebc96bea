"""The rules of ARCHITECTURE.md, read off the source with `ast`: floors, no hidden state, nothing that runs code on load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron"

# Who may import whom. A package may always import itself.
GROUND = {"files", "config", "mesh", "contract", "packages"}
FLOORS: dict[str, set[str]] = {
    "packages": set(),
    "files": set(),
    "config": {"files", "pipeline.schedule"},
    "contract": {"config"},
    "mesh": {"files", "config", "contract"},
    "parallel": GROUND,
    "kernels": GROUND,
    "model": GROUND | {"parallel", "kernels"},
    "pipeline": GROUND | {"parallel", "kernels"},
    "optim": GROUND | {"parallel", "kernels"},
    "data": GROUND | {"parallel", "kernels"},
    "checkpoint": GROUND | {"parallel", "kernels"},
    "plan": GROUND | {"parallel", "kernels", "model.size", "pipeline"},
}
# Floor 6: these may import everything.
TOP = {"train", "tasks", "serving", "stages", "generate", "beam", "model_flags", "restore", "export", "dryrun", "imports"}
TOP |= {"entry", "convert", "hf_tokenizers", "kept", "logits"}
# Files and packages that import no torch: they are tested in milliseconds and run anywhere.
PURE = [
    "files",
    "config",
    "entry.py",
    "packages.py",
    "mesh/grid.py",
    "mesh/memory.py",
    "mesh/place.py",
    "mesh/beats.py",
    "mesh/slate.py",
    "mesh/signals.py",
    "mesh/last_words.py",
    "mesh/errors.py",
    "train/progress.py",
    "train/wandb_run.py",
    "train/wandb_link.py",
    "train/wandb_writer.py",
    "train/going_on.py",
    "train/lock.py",
    "data/sample_index.py",
    "data/sentence_index.py",
    "data/masking.py",
    "data/indexed.py",
    "checkpoint/shards.py",
    "stages.py",
    "parallel/buckets.py",
    "serving/stops.py",
]
PURE += [f"pipeline/{name}.py" for name in ("schedule", "simulate", "draw", "lower", "partition")]
PURE += [f"model/{name}.py" for name in ("size", "flops", "state_size")]
PURE += [f"optim/{name}.py" for name in ("lr", "scaler", "sharding")]
PURE += [f"tasks/{name}.py" for name in ("windows", "wikitext")]
OPTIONAL = {"apex", "transformer_engine", "flash_attn", "wandb", "tensorboard", "transformers", "lm_eval"}
OPTIONAL |= {"starlette", "uvicorn"}
LONGEST = 400
REASON = "Longer than 400 lines because"


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


def place_of(module: str) -> str:
    """`megatron.model.size` -> `model.size`."""
    return module.removeprefix("megatron").removeprefix(".")


def floor_violations(path: Path, allowed: set[str], own: str) -> list[str]:
    wrong = []
    for module, node in imports(path):
        if module != "megatron" and not module.startswith("megatron."):
            continue
        place = place_of(module)
        if place in ("", "__version__") or place.split(".")[0] in {own, *allowed}:
            continue
        if any(place == a or place.startswith(a + ".") or a.startswith(place + ".") for a in allowed if "." in a):
            continue
        wrong.append(f"{shown(path, node)} imports {module}, which {own} may not")
    return wrong


def test_every_package_has_a_floor() -> None:
    here = {p.stem for p in PACKAGE.iterdir() if (p.is_dir() and any(p.glob("*.py"))) or p.suffix == ".py"} - {"__init__"}
    homeless = sorted(here - FLOORS.keys() - TOP)
    assert not homeless, f"give these a floor in tests/test_architecture.py: {homeless}"


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_floors(package: str) -> None:
    files = sorted((PACKAGE / package).rglob("*.py")) or list(PACKAGE.glob(f"{package}.py"))
    wrong = [line for path in files for line in floor_violations(path, FLOORS[package], package)]
    assert not wrong, "\n".join(wrong)


def test_the_floor_test_notices_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "megatron" / "data" / "bad.py"
    bad.parent.mkdir(parents=True)
    for line in (
        "import megatron.model.gpt",
        "from megatron.optim import lr",
        "from megatron import model",
        "from ..model import gpt",
    ):
        bad.write_text(f"def f():\n    {line}\n")
        assert floor_violations(bad, FLOORS["data"], "data"), line
    for line in (
        "import torch",
        "from megatron.parallel.spec import Part",
        "from . import gpt",
        "from megatron import __version__",
    ):
        bad.write_text(f"def f():\n    {line}\n")
        assert not floor_violations(bad, FLOORS["data"], "data"), line
    bad.write_text("from megatron.model.size import parameters\n")
    assert not floor_violations(bad, FLOORS["plan"], "plan")
    bad.write_text("from megatron.model.gpt import GPT\n")
    assert floor_violations(bad, FLOORS["plan"], "plan")


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
    return sorted(f for path in named for f in (path.rglob("*.py") if path.is_dir() else [path]) if f.exists())


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
    modules = ["megatron.config." + p.stem for p in sorted((PACKAGE / "config").glob("*.py")) if p.stem != "__init__"]
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
    """What a module would remember between calls: containers that its functions change, and process groups."""
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


def test_no_file_is_a_drawer() -> None:
    wrong = [shown(p) for p in sources() if re.fullmatch(r"_?(utils?|helpers?|commons?|misc)", p.stem)]
    assert not wrong, wrong


def test_files_are_read_in_one_sitting() -> None:
    wrong = []
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST and REASON not in (ast.get_docstring(tree(path)) or ""):
            wrong.append(f"{shown(path)} has {lines} lines; cut it, or begin a sentence of its docstring with '{REASON}'")
    assert not wrong, "\n".join(wrong)


def keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def unsafe(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Calls that would run code held in a file, and assertions (python -O drops them, and they explain nothing)."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield f"from {node.module} import", node
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.split(".")[0] in PICKLES and name.split(".")[-1] in {"load", "loads", "Unpickler"}:
                yield name, node
            if name == "torch.load" and keyword(node, "weights_only") is not True:
                yield "torch.load without weights_only=True", node
            if name in {"yaml.load", "torch.jit.load", "eval", "exec", "os.system", "os.popen", "__import__"}:
                yield name, node
            if keyword(node, "shell") is True:
                yield "a command given to a shell", node
            for flag in ("allow_pickle", "trust_remote_code"):
                if keyword(node, flag) is True:
                    yield f"{flag}=True", node


def test_loading_a_file_never_runs_code() -> None:
    own = [p for p in sources() if not p.is_relative_to(ROOT / "tests")]
    wrong = [f"{shown(p, n)}: {w}" for p in own for w, n in unsafe(tree(p))]
    assert not wrong, "\n".join(wrong)


def test_the_safety_test_notices_what_it_should() -> None:
    bad = ["pickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)"]
    bad += ["yaml.load(f)", "A.from_pretrained(d, trust_remote_code=True)", "exec(s)", "pickle.Unpickler(f)"]
    bad += ["from pickle import loads", "subprocess.run(c, shell=True)", "os.system(c)", "torch.jit.load(p)"]
    assert all(list(unsafe(ast.parse(code))) for code in bad)
    good = [
        "json.load(f)",
        "subprocess.run([c])",
        "re.compile(p)",
        "torch.load(p, weights_only=True)",
        "np.load(p)",
        "model.eval()",
        "safetensors.torch.load(b)",
    ]
    assert not any(list(unsafe(ast.parse(code))) for code in good)


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
