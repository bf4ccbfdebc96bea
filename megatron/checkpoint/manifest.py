"""The manifest of a checkpoint: its table of contents, as JSON.

A manifest lists the checkpoint's files with size and sha256, and for every tensor its pieces: rectangles, each stored in one
file. A manifest is untrusted input: every name, count and type in it is checked, and a manifest that contradicts itself is
refused. It ends with a checksum over itself, which detects damage but not forgery.
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
from megatron.checkpoint.storage import DTYPE_FROM_CODE, FileRecord
from megatron.files.regular import MAX_VALUES, count_values
from megatron.parallel.spec import Part

FORMAT, VERSION = "megatron-checkpoint", 1
MAX_DIMENSIONS = 8  # the coverage check visits 2^n corners of each piece
MIN_BYTES_PER_VALUE = 16  # text per value in a manifest of many pieces; a parsed value takes up to 64 bytes of memory
MAX_COUNT = 1 << 62  # bounds the digits of products of counts in error messages


@dataclass(frozen=True)
class Piece:
    """One rectangle of a tensor, in `file` under `key`."""

    file: str
    key: str
    part: Part


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a checkpoint. dtype: a safetensors code ("F32"). shape: global. pieces: a disjoint cover of the tensor."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """Table of contents of one checkpoint. files: by path relative to its directory, with `/`."""

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
        # The checksum is computed over the JSON text without the checksum.
        text = json.dumps(body, indent=1)
        return json.dumps({**body, "checksum": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Manifest:
        """Parse a manifest. ValueError, KeyError or TypeError if it is not one, is damaged or contradicts itself."""
        body = parse_strict_json(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f'it does not say "format": "{FORMAT}"')
        if body.get("version") != VERSION:
            raise ValueError(f"it has format version {body.get('version')!r}, this program reads {VERSION}")
        files = {_safe_path(name): _file(r) for name, r in _table(body["files"]).items()}
        tensors = {_text(name): _tensor(name, _table(record), files) for name, record in _table(body["tensors"]).items()}
        _check_file_sizes(files, tensors)
        manifest = cls(_count(body["iteration"]), files, tensors)
        # The whole text is compared, not only the checksum: unknown keys and other spellings of a number are refused too.
        if manifest.to_text() != text:
            raise ValueError("its checksum does not match: it was damaged or edited")
        return manifest


def parse_strict_json(text: str | bytes) -> Any:
    """Parse a JSON text more strictly than `json.loads`.

    ValueError for text that is not JSON in UTF-8, and for NaN and Infinity, a number out of range, a duplicate key in an
    object, nesting deeper than Python's recursion limit, and more values than a checkpoint's file of that size can contain.
    """

    def parse_finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {digits[:40]} is out of range")
        return value

    def refuse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    def require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return value

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        # Counted before parsing: a text of empty lists would take many times its size in memory.
        if count_values(text) > max(MAX_VALUES, len(text) // MIN_BYTES_PER_VALUE):
            raise ValueError("it contains more values than a checkpoint's file of its size can have")
        return json.loads(text, parse_float=parse_finite, parse_constant=refuse_constant, object_pairs_hook=require_unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _file(record: object) -> FileRecord:
    values = _table(record)
    return FileRecord(_count(values["bytes"]), _text(values["sha256"]))


def _tensor(name: str, record: dict[str, Any], files: Mapping[str, FileRecord]) -> TensorRecord:
    pieces = tuple(
        Piece(_safe_path(p["file"]), _text(p["key"]), Part(_counts(p["start"]), _counts(p["shape"])))
        for p in map(_table, _list(record["pieces"]))
    )
    tensor = TensorRecord(_text(record["dtype"]), _counts(record["shape"]), pieces)
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(tensor.shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if tensor.dtype not in DTYPE_FROM_CODE:
        raise ValueError(f"{name} has the unknown type {tensor.dtype!r}")
    if unknown := {p.file for p in pieces} - files.keys():
        raise ValueError(f"{name} is stored in {min(unknown)!r}, which is not listed")
    if why := coverage_error(tensor.shape, [p.part for p in pieces]):
        raise ValueError(f"{name}: {why}")
    return tensor


def _check_file_sizes(files: Mapping[str, FileRecord], tensors: Mapping[str, TensorRecord]) -> None:
    """Check that each file is large enough for its tensors. ValueError for the first that is not."""
    # A forged shape can then not make the loader allocate more memory than the files have bytes.
    tensor_bytes = dict.fromkeys(files, 0)
    for tensor in tensors.values():
        itemsize = DTYPE_FROM_CODE[tensor.dtype].itemsize
        for piece in tensor.pieces:
            tensor_bytes[piece.file] += prod(piece.part.shape) * itemsize
    for name, size in tensor_bytes.items():
        if size > files[name].bytes:
            raise ValueError(f"{name!r} has {files[name].bytes} bytes, too few for the {size} bytes of tensors in it")


def _safe_path(name: object) -> str:
    """Return a relative path that stays inside the checkpoint; ValueError for any other."""
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
        raise ValueError(f"{_short(value)} contains characters that are not printable")
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
