"""No file is read past `megatron/files/regular.py`: read off the source with `ast`, with the exceptions by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Methods and functions that open a file by its name to read it, and take whatever the name belongs to.
READS = {"read_text", "read_bytes", "json.load", "tomllib.load", "np.load", "np.fromfile", "np.loadtxt", "np.genfromtxt"}
READS |= {
    "Backend.from_file",
    "Tokenizer.from_file",
    "load_file",
    "torch.load",
    "gzip.open",
    "bz2.open",
    "lzma.open",
    "os.open",
}
READS |= {"np.memmap", "safe_open", "zipfile.ZipFile", "ZipFile", "tarfile.open", "json.loads", "linecache.getlines"}
OPENS = {"open", "io.open", "codecs.open"}
LAST = {name.rsplit(".", 1)[-1] for name in READS | OPENS}
# Where each may stand, and why it is safe there.
ALLOWED = {
    ("megatron/files/regular.py", "os.open"): "the module itself",
    ("megatron/files/regular.py", "json.loads"): "the module itself",
    ("megatron/launch/heartbeat.py", "read_text"): "files of the kernel, in /proc",
    ("megatron/launch/memory.py", "read_text"): "files of the kernel, in /proc and /sys",
    ("megatron/launch/command_line.py", "read_text"): "files of the kernel, in /proc",
    ("megatron/train/lock.py", "os.open"): "the run's lock, opened without following links or waiting",
    ("megatron/train/lock.py", "open"): "descriptors of the run's lock",
    ("megatron/mesh/shared_memory.py", "open"): "a file of the kernel, in /proc",
    ("megatron/mesh/shared_opening.py", "os.open"): "another rank's file in memory",
    ("megatron/train/lock.py", "json.loads"): "the text of a lock, of a bounded size",
    ("megatron/launch/job.py", "json.loads"): "a message of another rank",
    ("megatron/launch/heartbeat.py", "json.loads"): "a message of another rank",
    ("megatron/launch/watchdog.py", "json.loads"): "a message of another rank",
    ("megatron/launch/device.py", "json.loads"): "a message of another rank",
    ("megatron/train/wandb_writer.py", "os.open"): "a directory of W&B, to lock it; /dev/null",
    ("megatron/files/pending.py", "os.open"): "files of its own, written or locked",
    ("megatron/files/private.py", "os.open"): "files of its own, in a directory of this user alone",
    ("megatron/files/side.py", "os.open"): "a file of its own, written",
    ("megatron/data/index_cache.py", "os.open"): "a lock of its own",
    ("megatron/checkpoint/storage.py", "os.open"): "a directory that it made, to flush it",
    ("megatron/checkpoint/manifest.py", "json.loads"): "a text at hand, checked for depth and numbers",
    ("megatron/interop/hf_import.py", "safe_open"): "after check_regular",
    ("megatron/checkpoint/load.py", "safe_open"): "after check_regular",
    ("megatron/interop/safe_pickle.py", "torch.load"): "an opened file",
    ("megatron/interop/safe_pickle.py", "zipfile.ZipFile"): "an opened file",
    ("megatron/interop/released_archives.py", "zipfile.ZipFile"): "after check_regular",
    ("megatron/data/indexed.py", "np.memmap"): "after check_regular",
    ("tools/build_docs.py", "read_text"): "pages of this repository, and those that it has just written",
    ("megatron/data/indexed.py", "np.fromfile"): "after check_regular",
    ("megatron/data/index_cache.py", "np.load"): "after check_regular",
    ("megatron/data/slow_patterns.py", "json.loads"): "what the tokenizers package wrote",
    ("megatron/data/fast_cuts.py", "json.loads"): "what the tokenizers package wrote",
    ("megatron/data/train_bpe.py", "json.loads"): "what the tokenizers package wrote",
    ("megatron/serving/fields.py", "json.loads"): "the body of a request, of a bounded size",
    ("megatron/serving/chat_render.py", "json.loads"): "a message of the server that started it",
    ("megatron/serving/chat_template.py", "json.loads"): "a message of the process that it started, of a bounded size",
    ("megatron/serving/engine.py", "json.loads"): "a message of rank 0",
    ("megatron/train/sinks.py", "json.loads"): "a line of its own metrics",
    ("tools/install.py", "read_text"): "files of this repository, before the package is there",
    ("tools/install.py", "read_bytes"): "files of this repository, before the package is there",
}


def readings(module: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Calls that read a file, or a text that may have come from one."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        last = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if last not in LAST:
            continue
        name = ast.unparse(node.func)
        own = isinstance(node.func, ast.Name) or name.startswith(
            ("self.open", "np.", "json.", "os.", "torch.", "zipfile.", "gzip.")
        )
        if name in READS or (last in {"read_text", "read_bytes"} and not own):
            yield (last if last in {"read_text", "read_bytes"} else name), node
        elif (name in OPENS or (last == "open" and not own)) and not _writes(node, method=name not in OPENS):
            yield "open", node


def _writes(call: ast.Call, *, method: bool) -> bool:
    """Return whether the mode is given and says that the file is written."""
    modes = [call.args[0 if method else 1]] if len(call.args) > (0 if method else 1) else []
    modes += [word.value for word in call.keywords if word.arg == "mode"]
    return any(isinstance(mode, ast.Constant) and set(str(mode.value)) & set("wxa") for mode in modes)


def imported_readers(module: ast.Module) -> set[str]:
    """Its names that are ours: `read_text(path, MAX)` as a plain function."""
    return {
        alias.asname or alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(("files.regular", "tasks.reading"))
        for alias in node.names
    }


def bypasses(module: ast.Module, place: str) -> list[str]:
    ours = imported_readers(module) | {n.name for n in ast.walk(module) if isinstance(n, ast.FunctionDef)}
    return [
        f"{place}:{call.lineno}: {name}"
        for name, call in readings(module)
        if (place, name) not in ALLOWED and not (isinstance(call.func, ast.Name) and call.func.id in ours)
    ]


@pytest.fixture(scope="module")
def own_files() -> dict[str, ast.Module]:
    """The package's and the programs' files by their places."""
    found = [path for folder in ("megatron", "tools", "tasks") for path in (ROOT / folder).rglob("*.py")]
    files = sorted([*found, *ROOT.glob("pretrain_*.py")])
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def test_every_file_is_read_through_one_module(own_files: dict[str, ast.Module]) -> None:
    wrong = [line for place, module in own_files.items() for line in bypasses(module, place)]
    assert not wrong, "read through megatron.files.regular, or give a reason in ALLOWED:\n" + "\n".join(wrong)


def test_no_exception_outlives_its_reason(own_files: dict[str, ast.Module]) -> None:
    found = {(place, name) for place, module in own_files.items() for name, _ in readings(module)}
    assert not ALLOWED.keys() - found, ALLOWED.keys() - found


@pytest.mark.parametrize(
    "code",
    [
        "open(p)", "open(p, 'rb')", "p.open()", "p.open('rb')", "Path(p).read_text()", "p.read_bytes()", "json.load(f)",
        "np.load(p)", "Tokenizer.from_file(p)", "gzip.open(p)", "json.loads(text)", "open(p, encoding='utf-8')", "io.open(p)",
    ],
)  # fmt: skip
def test_the_test_notices_what_it_should(code: str) -> None:
    assert bypasses(ast.parse(code), "megatron/bad.py"), code


@pytest.mark.parametrize(
    "code",
    [
        "open(p, 'w')", "p.open('a')", "open(p, mode='xb')", "p.write_text(t)",
        "from megatron.files.regular import read_text\nread_text(p, 10)",
    ],
)  # fmt: skip
def test_the_test_lets_pass_what_it_should(code: str) -> None:
    assert not bypasses(ast.parse(code), "megatron/good.py"), code
