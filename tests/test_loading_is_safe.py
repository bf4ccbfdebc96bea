"""Nothing in the repository runs code that a file holds, read off the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from source_files import ROOT, shown, sources, tree


def keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def unsafe_calls(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
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
    wrong = [f"{shown(p, n)}: {w}" for p in own for w, n in unsafe_calls(tree(p))]
    assert not wrong, "\n".join(wrong)


def test_the_safety_test_notices_what_it_should() -> None:
    bad = ["pickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)"]
    bad += ["yaml.load(f)", "A.from_pretrained(d, trust_remote_code=True)", "exec(s)", "pickle.Unpickler(f)"]
    bad += ["from pickle import loads", "subprocess.run(c, shell=True)", "os.system(c)", "torch.jit.load(p)"]
    assert all(list(unsafe_calls(ast.parse(code))) for code in bad)
    good = [
        "json.load(f)",
        "subprocess.run([c])",
        "re.compile(p)",
        "torch.load(p, weights_only=True)",
        "np.load(p)",
        "model.eval()",
        "safetensors.torch.load(b)",
    ]
    assert not any(list(unsafe_calls(ast.parse(code))) for code in good)
