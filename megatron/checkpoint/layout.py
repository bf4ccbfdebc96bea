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
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.checkpoint.shards import fault
from megatron.checkpoint.storage import TORCH_DTYPES, FileRecord, record_of
from megatron.parallel.spec import Part

FORMAT, VERSION = "megatron-checkpoint", 1
MANIFEST, CONFIG, STATE, TOKENIZER = "manifest.json", "config.json", "state.json", "tokenizer"
TRACKER = "latest_checkpointed_iteration.txt"
NO_MANIFEST = f"it has no {MANIFEST}, so it is unfinished or not a checkpoint of this program"
DIRECTORY = re.compile(r"iter_(\d{7,})(\.replaced)?")


class CheckpointError(Exception):
    """A checkpoint cannot be found, read or written. The message names the path and what is wrong with it."""


class NoCheckpoint(CheckpointError):
    """There is none where one was looked for; nothing is damaged."""


@dataclass(frozen=True)
class Piece:
    """One rectangle of a tensor: which file holds it, under which key."""

    file: str
    key: str
    part: Part


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint. dtype: a safetensors code ("F32"). shape: of the whole. pieces: a disjoint cover."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """Table of contents of one checkpoint. files: paths relative to its directory, with `/`."""

    iteration: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]

    def to_text(self) -> str:
        """Canonical JSON, with a checksum over itself."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "iteration": self.iteration,
            "files": {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in sorted(self.files.items())},
            "tensors": {
                name: {
                    "dtype": t.dtype,
                    "shape": t.shape,
                    "pieces": [{"file": p.file, "key": p.key, "start": p.part.start, "shape": p.part.shape} for p in t.pieces],
                }
                for name, t in sorted(self.tensors.items())
            },
        }
        plain = json.dumps(body, indent=1)
        return json.dumps({**body, "checksum": hashlib.sha256(plain.encode()).hexdigest()}, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """ValueError, KeyError or TypeError when this is no manifest, was damaged, or contradicts itself."""
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if body.get("version") != VERSION:
            raise ValueError(f"it has format version {body.get('version')!r}, this program reads {VERSION}")
        files = {_inside(name): FileRecord(_count(r["bytes"]), _text(r["sha256"])) for name, r in body["files"].items()}
        tensors = {}
        for name, record in body["tensors"].items():
            pieces = tuple(
                Piece(_inside(p["file"]), _text(p["key"]), Part(_counts(p["start"]), _counts(p["shape"])))
                for p in record["pieces"]
            )
            tensor = TensorRecord(_text(record["dtype"]), _counts(record["shape"]), pieces)
            if tensor.dtype not in TORCH_DTYPES:
                raise ValueError(f"{name} has the unknown type {tensor.dtype!r}")
            if unknown := {p.file for p in pieces} - files.keys():
                raise ValueError(f"{name} lies in {min(unknown)!r}, which is not listed")
            if why := fault(tensor.shape, [p.part for p in pieces]):
                raise ValueError(f"{name}: {why}")
            tensors[name] = tensor
        manifest = cls(_count(body["iteration"]), files, tensors)
        if manifest.to_text() != text:
            raise ValueError("its checksum does not match: it was damaged or edited")
        return manifest


def _inside(name: object) -> str:
    """A file name that stays inside the checkpoint; ValueError for every other."""
    text = _text(name)
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text or str(path) != text:
        raise ValueError(f"the file name {text!r} leads outside the checkpoint")
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"expected a count, got {value!r}")
    return value


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list of counts, got {values!r}")
    return tuple(_count(v) for v in values)


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


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory. CheckpointError names the file and what is wrong with it."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory")
    if not path.is_file():
        raise CheckpointError(f"{directory}: {NO_MANIFEST}")
    try:
        return Manifest.from_text(path.read_text())
    except KeyError as error:
        raise CheckpointError(f"{path}: not a usable manifest: {error} is missing") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a usable manifest: {error}") from error


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """CheckpointError for the first file that is not there or has another size than the manifest says."""
    for name, record in manifest.files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror}") from error
        if size != record.bytes:
            raise CheckpointError(f"{directory / name}: {size} bytes, the manifest says {record.bytes}")


def verify(directory: Path) -> Manifest:
    """Compare every byte with the manifest. CheckpointError names the first file that differs or does not belong."""
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    for name, record in manifest.files.items():
        try:
            same = record_of(directory / name) == record
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror}") from error
        if not same:
            raise CheckpointError(f"{directory / name}: its bytes do not match the manifest's sha256")
    match = DIRECTORY.fullmatch(directory.resolve().name)
    if match and int(match[1]) != manifest.iteration:
        raise CheckpointError(f"{directory / MANIFEST}: it is of iteration {manifest.iteration}")
    return manifest


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """One of a checkpoint's JSON files, compared with the manifest. CheckpointError names the file."""
    path = directory / name
    record = read_manifest(directory).files.get(name)
    if record is None:
        raise CheckpointError(f"{directory / MANIFEST}: it lists no {name}")
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != record.sha256:
            raise CheckpointError(f"{path}: its bytes do not match the manifest's sha256")
        value = json.loads(raw)
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
    return read_json(directory, STATE)


def read_tracker(root: Path) -> int | None:
    """The iteration that `root` announces as its latest; None when there is no tracker. CheckpointError for a bad one."""
    path = root / TRACKER
    if not path.exists():
        return None
    try:
        text = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not re.fullmatch(r"\d{1,15}", text):
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
    """path: the newest whole checkpoint, or None. skipped: one line for each newer one that was passed over."""

    path: Path | None
    skipped: tuple[str, ...]


def newest_complete(root: Path) -> Newest:
    """The newest checkpoint under `root` whose files all have the size that its manifest says.

    Newest is the one that the tracker names, or one of a later iteration that was finished after the tracker was written:
    the writer died between the two. Directories of a later iteration that are older than the tracker belong to a run that
    was wound back, and are passed over.
    """
    skipped = [f"{path}: a save that was interrupted" for path in sorted(root.glob(".iter_*.tmp"))]
    try:
        announced = read_tracker(root)
    except CheckpointError as error:
        announced = None
        skipped.append(str(error))
    for number, path in reversed(iterations(root).items()):
        try:
            check_sizes(path, read_manifest(path))
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        later = announced is not None and number > announced
        if later and (path / MANIFEST).stat().st_mtime_ns < (root / TRACKER).stat().st_mtime_ns:
            skipped.append(f"{path}: it is older than the latest save, of iteration {announced}")
            continue
        return Newest(path, tuple(skipped))
    return Newest(None, tuple(skipped))
