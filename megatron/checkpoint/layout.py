"""What a checkpoint is on disk, which one is the latest, and whether one is whole.

    SAVE/
      latest_checkpointed_iteration.txt      the number of the last one that was finished; replaced last
      iter_0000100/
        manifest.json                        every tensor and its pieces, every file with its size and sha256
        config.json                          the merged configuration of the run
        state.json                           the small values of all parts: iteration, consumed samples, ...
        shard_00000.safetensors              plain tensors, one file per rank that wrote some
        tokenizer/                           the tokenizer's own files

Tensors have global names with the part in front: `model.layers.0.attention.qkv.weight`. A tensor that was cut into pieces
carries each piece's start in the file's key: `model.head.weight@64,0`. The layout of the run that saved appears nowhere
else, and nothing is pickled.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron.checkpoint.manifest import Manifest, Piece, TensorRecord, plain_json
from megatron.checkpoint.storage import record_of
from megatron.config.regular_file import read_bytes, read_text

__all__ = [
    "CheckpointError", "Manifest", "Newest", "NoCheckpoint", "Piece", "TensorRecord", "check_bytes", "check_sizes",
    "directory_name", "find", "iterations", "newest_complete", "others", "path_in", "read_config", "read_json", "read_manifest",
    "read_state", "read_tracker", "verify",
]  # fmt: skip

MANIFEST, CONFIG, STATE, TOKENIZER = "manifest.json", "config.json", "state.json", "tokenizer"
TRACKER = "latest_checkpointed_iteration.txt"
NO_MANIFEST = f"it has no {MANIFEST}, so it is unfinished or not a checkpoint of this program"
DIRECTORY = re.compile(r"iter_(\d{7,15})(\.replaced)?")
MAX_TRACKER_BYTES = 1000
MOST_JSON = 1 << 30  # bytes of a JSON file; the manifest of a thousand ranks has a few hundred million
NONE: Mapping[Path, str] = MappingProxyType({})


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or written. The message names the path and what is wrong with it."""


class NoCheckpoint(CheckpointError):
    """There is none where one was looked for; nothing is damaged."""


def directory_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def iterations(root: Path) -> dict[int, Path]:
    """Every checkpoint directory under `root`, whole or not, in ascending order of iteration.

    `iter_0000100.replaced` is the one that a second save of the same iteration set aside: it counts only while its
    successor is not there yet.
    """
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir(), key=lambda p: p.name) if root.is_dir() else []:
        match = DIRECTORY.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return dict(sorted(found.items()))


def path_in(directory: Path, name: str) -> Path:
    """A regular file of a checkpoint. CheckpointError when it is not there, none, or a link to outside the directory."""
    path = directory / name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(directory.resolve()):
            raise CheckpointError(f"{path}: it is a link that leads outside the checkpoint, to {real}")
        if not stat.S_ISREG(real.stat().st_mode):
            raise CheckpointError(f"{path}: it is not a regular file")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _bytes(path: Path) -> bytes:
    """A file that is to be JSON. OSError when it is too large to be one of ours."""
    return read_bytes(path, MOST_JSON)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory. CheckpointError names the file and what is wrong with it."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory")
    if not os.path.lexists(path):
        raise CheckpointError(f"{directory}: {NO_MANIFEST}")
    try:
        return Manifest.from_text(_bytes(path_in(directory, MANIFEST)).decode("utf-8"))
    except KeyError as error:
        raise CheckpointError(f"{path}: not a usable manifest: {error} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a usable manifest: {error}") from error


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """CheckpointError for the first file that is not there, leads elsewhere, or has another size than the manifest says."""
    for name, record in manifest.files.items():
        size = path_in(directory, name).stat().st_size
        if size != record.bytes:
            raise CheckpointError(f"{directory / name}: {size} bytes, the manifest says {record.bytes}")
    match = DIRECTORY.fullmatch(directory.resolve().name)
    if match and int(match[1]) != manifest.iteration:
        raise CheckpointError(f"{directory / MANIFEST}: it is of iteration {manifest.iteration}")


def check_bytes(
    directory: Path, manifest: Manifest, names: Iterable[str], tell: Callable[[str], None] = lambda what: None
) -> None:
    """Read these files to the end. CheckpointError for the first whose bytes are not those that were written.

    tell: is told how far it has come, in words.
    """
    for name in names:
        path = path_in(directory, name)
        try:
            same = record_of(path, tell) == manifest.files[name]
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        if not same:
            raise CheckpointError(f"{path}: its bytes do not match the manifest's sha256")


def verify(directory: Path) -> Manifest:
    """Compare every byte with the manifest. CheckpointError names the first file that differs. One process reads it all."""
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    check_bytes(directory, manifest, manifest.files)
    return manifest


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """One of a checkpoint's JSON files, compared with the manifest. CheckpointError names the file."""
    record = read_manifest(directory).files.get(name)
    if record is None:
        raise CheckpointError(f"{directory / MANIFEST}: it lists no {name}")
    path = path_in(directory, name)
    try:
        raw = _bytes(path)
        if hashlib.sha256(raw).hexdigest() != record.sha256:
            raise CheckpointError(f"{path}: its bytes do not match the manifest's sha256")
        value = plain_json(raw)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """The merged configuration of the run that saved the checkpoint."""
    return read_json(directory, CONFIG)


def read_state(directory: Path) -> dict[str, dict[str, Any]]:
    """The scalars of every part, by the part's name."""
    state = read_json(directory, STATE)
    for part, values in state.items():
        if not isinstance(values, dict):
            raise CheckpointError(f"{directory / STATE}: {part}: expected a JSON object")
    return state


def read_tracker(root: Path) -> int | None:
    """The iteration that `root` announces as its latest; None when there is no tracker. CheckpointError for a bad one."""
    path = root / TRACKER
    if not os.path.lexists(path):
        return None
    try:
        text = read_text(path_in(root, TRACKER), MAX_TRACKER_BYTES).strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise CheckpointError(f"{path}: expected an iteration number, found {text[:40]!r}. {_present(root)}")
    return int(text)


def _present(root: Path) -> str:
    numbers = list(iterations(root))
    if not numbers:
        return "No iter_ directory is there"
    listed = ", ".join(map(str, numbers[-10:]))
    return f"Iterations there: {'..., ' if len(numbers) > 10 else ''}{listed}; choose one with --load-iteration"


def find(path: Path, iteration: int | None = None) -> Path:
    """The checkpoint directory that `path` means: itself, or the latest (or the given iteration) under it.

    NoCheckpoint, naming near candidates, when there is none; CheckpointError when what is there is unfinished. Of the
    manifest only the presence is tested.
    """
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3)
        hint = f". Near it: {', '.join(str(path.parent / n) for n in near)}" if near else ""
        raise NoCheckpoint(f"{path}: there is no such directory{hint}")
    if not path.is_dir():
        raise NoCheckpoint(f"{path}: expected a directory of checkpoints, this is a file")
    if (path / MANIFEST).is_file():
        if iteration is not None and (held := read_manifest(path).iteration) != iteration:
            raise NoCheckpoint(f"{path}: it is of iteration {held}, not {iteration}")
        return path
    present = iterations(path)
    wanted = iteration if iteration is not None else read_tracker(path)
    if wanted is None:
        if DIRECTORY.fullmatch(path.name):
            raise CheckpointError(f"{path}: {NO_MANIFEST}")
        raise NoCheckpoint(f"{path}: no checkpoint here, there is no {TRACKER}. {_present(path)}")
    if wanted not in present:
        if iteration is None:
            raise CheckpointError(f"{path / TRACKER}: it names iteration {wanted}, which is not there. {_present(path)}")
        raise NoCheckpoint(f"{path}: there is no iteration {wanted}. {_present(path)}")
    if not (present[wanted] / MANIFEST).is_file():
        raise CheckpointError(f"{present[wanted]}: {NO_MANIFEST}. {_present(path)}")
    return present[wanted]


@dataclass(frozen=True)
class Newest:
    """path: the newest whole checkpoint, or None. skipped: one line for each newer one that was passed over.

    empty: no checkpoint was ever finished here, so there is nothing to lose.
    """

    path: Path | None
    skipped: tuple[str, ...]
    empty: bool = False


def newest_complete(root: Path, damaged: Mapping[Path, str] = NONE) -> Newest:
    """The newest checkpoint under `root` that is whole, as far as a glance tells: all sizes, and the bytes of small files.

    Newest is the one that the tracker names, or one of a later iteration that was finished after the tracker was written:
    the writer died between the two. Directories of a later iteration that are older than the tracker belong to a run that
    was wound back, and are passed over. damaged: those that are known to be, and why.
    """
    skipped = [f"{path}: a save that was interrupted" for path in sorted(root.glob(".iter_*.tmp"))]
    present = iterations(root)
    try:
        announced = read_tracker(root)
        if announced is not None and announced not in present:
            skipped.append(f"{root / TRACKER}: it names iteration {announced}, which is not there")
    except CheckpointError as error:
        announced = None
        skipped.append(str(error))
    # A second save of an iteration may be damaged where the first, which it has set aside, is whole.
    candidates = [(n, p.with_name(directory_name(n) + end)) for n, p in reversed(present.items()) for end in ("", ".replaced")]
    for number, path in candidates:
        if not path.is_dir():
            continue
        try:
            if path in damaged:
                raise CheckpointError(damaged[path])
            manifest = read_manifest(path)
            check_sizes(path, manifest)
            check_bytes(path, manifest, (name for name in manifest.files if not name.endswith(".safetensors")))
            later = announced is not None and number > announced
            if later and (path / MANIFEST).stat().st_mtime_ns < (root / TRACKER).stat().st_mtime_ns:
                raise CheckpointError(f"{path}: it is older than the latest save, of iteration {announced}")
        except (CheckpointError, OSError) as error:
            skipped.append(str(error))
            continue
        return Newest(path, tuple(skipped))
    return Newest(None, tuple(skipped), empty=not present and not os.path.lexists(root / TRACKER))


def others(directory: Path) -> str:
    """What to say to somebody whose choice, `directory`, is damaged: which iterations lie beside it."""
    match = DIRECTORY.fullmatch(directory.resolve().name)
    numbers = [n for n in iterations(directory.resolve().parent) if not match or n != int(match[1])]
    listed = ", ".join(map(str, numbers[-10:]))
    return (
        f"Other iterations there: {'..., ' if len(numbers) > 10 else ''}{listed}" if numbers else "No other iteration is there"
    )
