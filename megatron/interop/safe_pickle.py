"""Read files that torch.save wrote, without executing code that they name.

Such a file is a pickle: it names classes and functions for its reader to import and call. Megatron-LM's checkpoints hold
tensors among many such objects, whose classes do not exist here. Each name that torch does not allow by itself is therefore
replaced by `InertObject`, which stores its arguments and does nothing, so no code of the file's choice is imported or called.
torch refuses a file that names a dangerous part of the interpreter.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron.checkpoint.layout import CheckpointError
from megatron.files.foreign import LFS_POINTER, is_lfs_pointer
from megatron.files.regular import open_regular

MAX_DEPTH = 50  # of nested dictionaries
MAX_DICTIONARY_ENTRIES = 1_000_000  # of all dictionaries together
# Where torch's error messages begin to advise how to load the file all the same, which would let it execute code.
UNSAFE_ADVICE = re.compile(r" was not (?:an )?allowed|In PyTorch 2")
LEGACY_PICKLES = 4  # in a file from before torch 1.6: consecutive pickles, the last of which is the value


class InertObject:
    """Stand-in for an object of a class that was not imported.

    Attributes:
        args: the positional arguments for the object's class.
        state: the argument for its `__setstate__`, in most cases the dictionary of its attributes.
    """

    def __new__(cls, *args: Any, **_: Any) -> InertObject:
        inert = super().__new__(cls)
        inert.args, inert.state = args, None
        return inert

    def __init__(self, *args: Any, **_: Any) -> None:
        """Do nothing: `__new__` sets the attributes, since an unpickler may not call `__init__`."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    args: tuple[Any, ...]
    state: Any

    def attributes(self) -> Mapping[str, Any]:
        """Return the attributes that the object would have, such as an argparse.Namespace's; empty if they are unknown."""
        return self.state if isinstance(self.state, dict) else {}


def read_pickled(source: Path | bytes, name: str) -> dict[str, Any]:
    """Return the dictionary in a file of torch.save, with its tensors on the CPU.

    Args:
        source: the file's path, or its content.
        name: the file's name, for messages.

    Raises:
        CheckpointError: the file is not one of torch.save, contains no dictionary, or is unsafe.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            size = file.seek(0, io.SEEK_END)
            check_unpacked(file, size, name)
            # torch uses a subclass of InertObject for each name, except those on its own block list, which it refuses.
            stubs: list[Any] = [(type("Inert", (InertObject,), {}), qualified) for qualified in sorted(_unknown_globals(file))]
            file.seek(0)
            with torch.serialization.safe_globals(stubs):
                value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line] or str(error).splitlines() or [""]
        why = UNSAFE_ADVICE.split(lines[0])[0].strip()
        raise CheckpointError(f"{name}: it was not read, since it asks for more than weights: {why}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(source, Path) and is_lfs_pointer(source):
            raise CheckpointError(f"{name}: it is {LFS_POINTER}") from error
        said = UNSAFE_ADVICE.split(" ".join(str(error).split()))[0].strip()
        why = getattr(error, "strerror", None) or said[:300] or type(error).__name__
        raise CheckpointError(f"{name}: not a readable file of torch.save: {why}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: expected a dictionary of tensors, found a {type(value).__name__}")
    check_plain(value, size, name)
    return value


def check_unpacked(file: BinaryIO, size: int, name: str) -> None:
    """Raise CheckpointError for a zip whose entries are compressed or overlap, a possible zip bomb; torch.save writes none.

    Args:
        file: the opened file.
        size: the file's size in bytes.
        name: the file's name, for messages.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{name}: it is compressed, {unpacked:,} bytes in a file of {size:,}; torch.save never compresses, so another "
            "program wrote it, perhaps to fill the memory"
        )


def check_plain(value: Mapping[Any, Any], size: int, name: str) -> None:
    """Raise CheckpointError for dictionaries nested too deeply or in themselves, and for tensors larger than the file.

    Such a tensor repeats a few bytes of the file, by strides of 0, and takes memory only when it is copied.

    Args:
        value: the file's content.
        size: the file's size in bytes.
        name: the file's name, for messages.
    """
    level: list[Any] = [value]  # all dictionaries at one depth
    count = 0
    for _ in range(MAX_DEPTH):
        level = [item for table in level for item in table.values()]
        for item in level:
            if isinstance(item, Tensor):
                if item.layout is not torch.strided or item.device.type != "cpu":
                    raise CheckpointError(
                        f"{name}: a tensor is {item.layout} on {item.device}; only dense ones on the CPU are read"
                    )
                if item.numel() * item.element_size() > size:
                    raise CheckpointError(f"{name}: a tensor of shape {tuple(item.shape)} is larger than the whole file")
        level = [item for item in level if isinstance(item, Mapping)]
        count += sum(map(len, level))
        if not level or count > MAX_DICTIONARY_ENTRIES:
            break
    if level:
        raise CheckpointError(f"{name}: its dictionaries are nested too deeply, or contain themselves")


def _unknown_globals(file: BinaryIO) -> set[str]:
    """Return the classes and functions outside torch and builtins that the file names; found without unpickling it."""
    names: set[str] = set()
    for stream in _pickles(file):
        strings: list[str] = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":  # argument "module name"; protocol 4 takes both from the stack instead
                names.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                names.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    known = {"collections.OrderedDict"}
    return {name for name in names if not name.startswith(("torch.", "__builtin__.", "builtins.")) and name not in known}


def _pickles(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield a stream for each pickle in a file, which the caller must read before it takes the next."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            yield file  # the caller reads exactly one pickle, so the file is then at the next
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.namelist():
            if entry.endswith("/data.pkl"):
                yield io.BytesIO(archive.read(entry))
