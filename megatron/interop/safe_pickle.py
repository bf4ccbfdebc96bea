"""Read files that torch.save wrote without running anything that they ask for.

Such a file is a pickle: it names classes and functions that its reader shall import and call. Megatron-LM's checkpoints hold
tensors among many such objects, of classes that are not here. So each name that torch does not know to be harmless stands for
an `InertObject`, which keeps what it was given and does nothing. Nothing in the file is imported or called; a file that names
a part of the interpreter that could do harm is refused by torch.
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

MAX_DEPTH = 50  # of dictionaries in one another
MAX_DICTIONARY_ENTRIES = 1_000_000  # of all dictionaries together
ADVICE = re.compile(r" was not (?:an )?allowed|In PyTorch 2")  # what torch says next would let a file's code run
LEGACY_PICKLES = 4  # before torch 1.6 a file held four pickles, one after the other, and the last is the value


class InertObject:
    """Stand-in for an object of a class that was not imported.

    Attributes:
        args: the arguments that its class would have been called with.
        state: the value that would have been given to its `__setstate__`, mostly its attributes.
    """

    def __new__(cls, *args: Any, **_: Any) -> InertObject:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **_: Any) -> None:
        """Everything was done in `__new__`, since an unpickler may leave this out."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    args: tuple[Any, ...]
    state: Any

    def attributes(self) -> Mapping[str, Any]:
        """Return the attributes that it would have, as those of an argparse.Namespace."""
        return self.state if isinstance(self.state, dict) else {}


def read_pickled(source: Path | bytes, name: str) -> dict[str, Any]:
    """Return the dictionary in a file of torch.save, with its tensors on the CPU.

    Args:
        source: the file, or its bytes.
        name: of the file, for messages.

    Raises:
        CheckpointError: when it is no such file, or when it asks for what could do harm.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            size = file.seek(0, io.SEEK_END)
            check_unpacked(file, size, name)
            # torch takes a class of ours for each name; what it knows to be harmful it refuses in spite of that.
            stubs: list[Any] = [(type("Inert", (InertObject,), {}), wanted) for wanted in sorted(_foreign_globals(file))]
            file.seek(0)
            with torch.serialization.safe_globals(stubs):
                value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        lines = [line for line in str(error).splitlines() if "GLOBAL" in line] or str(error).splitlines() or [""]
        why = ADVICE.split(lines[0])[0].strip()
        raise CheckpointError(f"{name}: it was not read, since it asks for more than weights: {why}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(source, Path) and is_lfs_pointer(source):
            raise CheckpointError(f"{name}: it is {LFS_POINTER}") from error
        said = ADVICE.split(" ".join(str(error).split()))[0].strip()
        why = getattr(error, "strerror", None) or said[:300] or type(error).__name__
        raise CheckpointError(f"{name}: not a readable file of torch.save: {why}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: expected a dictionary of tensors, found a {type(value).__name__}")
    check_plain(value, size, name)
    return value


def check_unpacked(file: BinaryIO, size: int, name: str) -> None:
    """Raise CheckpointError where a zip of torch.save would unpack to more than the file's own size: torch packs nothing.

    Args:
        file: opened.
        size: of the file, in bytes.
        name: of the file, for messages.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{name}: its parts are packed, {unpacked:,} bytes in a file of {size:,}; torch.save packs nothing, so another "
            "program wrote it, perhaps to fill the memory"
        )


def check_plain(value: Mapping[Any, Any], size: int, name: str) -> None:
    """Raise CheckpointError for dictionaries in themselves, and for tensors that are more than the file holds.

    Such a tensor repeats a few bytes of the file, by strides of 0, which costs nothing until it is copied.

    Args:
        value: the file's content.
        size: of the file, in bytes.
        name: of the file, for messages.
    """
    level: list[Any] = [value]  # all dictionaries at one depth
    count = 0
    for _ in range(MAX_DEPTH):
        level = [held for table in level for held in table.values()]
        for held in level:
            if isinstance(held, Tensor):
                if held.layout is not torch.strided or held.device.type != "cpu":
                    raise CheckpointError(f"{name}: a tensor of it is {held.layout} on {held.device}; only plain ones are read")
                if held.numel() * held.element_size() > size:
                    raise CheckpointError(f"{name}: a tensor of it has shape {tuple(held.shape)}, more than the whole file")
        level = [held for held in level if isinstance(held, Mapping)]
        count += sum(map(len, level))
        if not level or count > MAX_DICTIONARY_ENTRIES:
            break
    if level:
        raise CheckpointError(f"{name}: its dictionaries are nested too deeply, or hold themselves")


def _foreign_globals(file: BinaryIO) -> set[str]:
    """Return every class and function that the file names and that torch does not know; found without unpickling."""
    found: set[str] = set()
    for stream in _pickles(file):
        strings: list[str] = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":  # its argument is "module name"; from protocol 4 on both lie on the stack
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                found.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    known = {"collections.OrderedDict"}
    return {name for name in found if not name.startswith(("torch.", "__builtin__.", "builtins.")) and name not in known}


def _pickles(file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the pickles of a file, each in its turn."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            yield file  # whoever reads it stops behind one pickle
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.namelist():
            if entry.endswith("/data.pkl"):
                yield io.BytesIO(archive.read(entry))
