"""The table of contents of a checkpoint, as JSON that is believed only as far as it was checked.

A manifest says which files a checkpoint has, with size and sha256, and of which rectangles in which file every tensor is
made. It comes from a disk, perhaps from strangers, so every name, count and type in it is looked at, and what contradicts
itself is refused. It ends with a checksum over itself, which finds damage; it does not stop somebody who forges it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath
from typing import Any

from megatron.checkpoint.shards import coverage_error
from megatron.checkpoint.storage import TORCH_DTYPES, FileRecord
from megatron.files.regular import MAX_VALUES, count_values
from megatron.parallel.spec import Part

FORMAT, VERSION = "megatron-checkpoint", 1
MAX_DIMENSIONS = 8  # a check of coverage looks at 2^n corners of each piece
MIN_BYTES_PER_VALUE = 16  # of the text of a manifest of many pieces; a value takes as much as 64 in memory
MAX_COUNT = 1 << 62  # products of a few counts are still printed, never allocated


@dataclass(frozen=True)
class Piece:
    """One rectangle of a tensor, in `file` under `key`."""

    file: str
    key: str
    part: Part


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint. dtype: a safetensors code ("F32"). shape: of the whole. pieces: cover it, without overlap."""

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
        """Return canonical JSON, with a checksum over itself."""
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
        # The checksum is that of the text without it, so it is made from the same JSON twice.
        plain = json.dumps(body, indent=1)
        return json.dumps({**body, "checksum": hashlib.sha256(plain.encode()).hexdigest()}, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Read a manifest. ValueError, KeyError or TypeError when it is none, was damaged, or contradicts itself."""
        body = parse_strict_json(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if body.get("version") != VERSION:
            raise ValueError(f"it has format version {body.get('version')!r}, this program reads {VERSION}")
        files = {_inside(name): _file(r) for name, r in _table(body["files"]).items()}
        tensors = {_text(name): _tensor(name, _table(record), files) for name, record in _table(body["tensors"]).items()}
        _check_file_sizes(files, tensors)
        manifest = cls(_count(body["iteration"]), files, tensors)
        # Byte for byte, not the checksum alone: keys that are not read, or another way to write a number, count as well.
        if manifest.to_text() != text:
            raise ValueError("its checksum does not match: it was damaged or edited")
        return manifest


def parse_strict_json(text: str | bytes) -> Any:
    """Parse a JSON text, as strict as what writes it.

    ValueError for anything but JSON in UTF-8: also for NaN and Infinity, a number out of range, a key that stands twice in
    one object, more nesting than Python reads, and more values than a checkpoint's files hold.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {digits[:40]} is out of range")
        return value

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        # Counted before it is parsed: a small text of empty lists would take many times its size in memory.
        if count_values(text) > max(MAX_VALUES, len(text) // MIN_BYTES_PER_VALUE):
            raise ValueError("it holds more values than a checkpoint of its size has")
        return json.loads(text, parse_float=number, parse_constant=constant, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _file(record: object) -> FileRecord:
    values = _table(record)
    return FileRecord(_count(values["bytes"]), _text(values["sha256"]))


def _tensor(name: str, record: dict[str, Any], files: Mapping[str, FileRecord]) -> TensorRecord:
    pieces = tuple(
        Piece(_inside(p["file"]), _text(p["key"]), Part(_counts(p["start"]), _counts(p["shape"])))
        for p in map(_table, _list(record["pieces"]))
    )
    tensor = TensorRecord(_text(record["dtype"]), _counts(record["shape"]), pieces)
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(tensor.shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if tensor.dtype not in TORCH_DTYPES:
        raise ValueError(f"{name} has the unknown type {tensor.dtype!r}")
    if unknown := {p.file for p in pieces} - files.keys():
        raise ValueError(f"{name} lies in {min(unknown)!r}, which is not listed")
    if why := coverage_error(tensor.shape, [p.part for p in pieces]):
        raise ValueError(f"{name}: {why}")
    return tensor


def _check_file_sizes(files: Mapping[str, FileRecord], tensors: Mapping[str, TensorRecord]) -> None:
    """Check that each file is large enough for what lies in it. ValueError where one is not."""
    # So no shape that is read later asks for more memory than there is on the disk.
    held = dict.fromkeys(files, 0)
    for tensor in tensors.values():
        width = TORCH_DTYPES[tensor.dtype].itemsize
        for piece in tensor.pieces:
            held[piece.file] += prod(piece.part.shape) * width
    for name, size in held.items():
        if size > files[name].bytes:
            raise ValueError(f"{name!r} has {files[name].bytes} bytes, too few for the {size} bytes of tensors in it")


def _inside(name: object) -> str:
    """Return a file name that stays inside the checkpoint; ValueError for every other."""
    text = _text(name)
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or "\\" in text or "\0" in text or str(path) != text or text == ".":
        raise ValueError(f"the file name {text!r} leads outside the checkpoint")
    return text


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {_short(value)}")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {_short(value)}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {_short(value)}")
    if not value.isprintable():
        raise ValueError(f"{_short(value)} holds characters that no name has")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_COUNT:
        raise TypeError(f"expected a count, got {_short(value)}")
    return value


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list of counts, got {_short(values)}")
    return tuple(_count(v) for v in values)


def _short(value: object) -> str:
    """Return a value as text of at most 80 characters, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
