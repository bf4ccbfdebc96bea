"""Cache sample indices on disk: one process builds an index, and all others map it into memory.

An index is stored in `DIRECTORY/<digest of the dataset's path>/<digest of settings and file version>/`, which is created by a
rename, so that it is never incomplete. The process that builds it holds a file lock, which the kernel releases if the process
dies. The other processes wait for the lock up to a time limit, after which they build the index in memory. All processes do
that if the directory cannot be written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.files.regular import check_regular, read_json

MMAP_MIN_SIZE = 100_000  # array elements; smaller indices are read into memory
VERSION = 1  # version of the sample order and of the cache's files
Arrays = dict[str, NDArray[Any]]


class IndexCache:
    """Stores index arrays in a directory, by default `cache` beside each dataset.

    timeout: seconds to wait for another process that builds an index.
    """

    def __init__(self, directory: str | None = None, timeout: float = 600.0) -> None:
        self.directory, self.timeout = directory, timeout

    def folder(self, prefix: str) -> Path:
        """Return the directory of a dataset's cache."""
        return Path(self.directory) if self.directory else Path(prefix).parent / "cache"

    def get(self, prefix: str, key: dict[str, object], build: Callable[[], Arrays], source: str | None = None) -> Arrays:
        """Return the arrays that `build` makes for a dataset with these settings: from the cache, or built and stored there.

        Args:
            prefix: the dataset, which determines the default directory and appears in messages.
            key: the settings; must be serializable as JSON.
            build: makes the arrays.
            source: a file whose size and modification time are added to the key, so that a replaced file is noticed.

        Raises:
            DataError: if `build` raises it.
        """
        log = logging.getLogger(__name__)
        folder = self.folder(prefix)
        settings: dict[str, object] = {"version": VERSION, **key}
        stamp: dict[str, object] = {}
        if source is not None:
            stat = os.stat(source)
            settings["source"] = os.path.realpath(source)
            stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        folder /= json_digest({"source": settings.get("source")})  # a directory per dataset
        index_folder = folder / json_digest({**settings, **stamp})  # with a directory per key
        found = load_arrays(index_folder)
        if found is not None:
            log.info("%s: index from cache %s", prefix, index_folder)
            return found
        arrays: Arrays | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file_lock(folder / f".{index_folder.name}.lock", self.timeout):
                found = load_arrays(index_folder)  # again, since another process may have built it meanwhile
                if found is not None:
                    log.info("%s: index from cache %s, built by another process", prefix, index_folder)
                    return found
                if any(source_changed(other, stamp) for other in folder.glob("*/about.json")):
                    log.warning("%s changed since an index of it was built; rebuilding it", source)
                arrays = build()
                write_arrays(arrays, index_folder, {**settings, **stamp})
                return load_arrays(index_folder) or arrays
        except OSError as error:  # a full or read-only disk, or the timeout of the lock
            log.warning("no index cache in %s (%s); every process builds its index in memory", folder, error)
            return build() if arrays is None else arrays


def json_digest(value: dict[str, object]) -> str:
    """Return 16 hexadecimal digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def load_arrays(index_folder: Path) -> Arrays | None:
    """Return the arrays in a directory, memory-mapped; None if some are missing or are not integer arrays."""
    try:
        about = read_json(index_folder / "about.json")
        shapes = {name: tuple(shape) for name, shape in about["arrays"].items() if name.isidentifier()}
        # Mapped even if small, so that a damaged header cannot make this process allocate memory.
        for name in shapes:
            check_regular(index_folder / f"{name}.npy")
        arrays = {name: np.load(index_folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in shapes}
        for name, array in arrays.items():
            if not isinstance(array, np.memmap) or array.shape != shapes[name] or array.dtype.kind not in "iu":
                return None
        # A memory map keeps its file open, and a blend of thousands of datasets would exceed the limit of open files.
        small = sum(array.size for array in arrays.values()) <= MMAP_MIN_SIZE
        found: Arrays = {name: np.array(array) for name, array in arrays.items()} if small else {**arrays}
        return found if len(shapes) == len(about["arrays"]) else None
    except Exception:  # numpy raises many kinds for damaged files, and all mean that the index must be built
        return None


def source_changed(about_file: Path, stamp: dict[str, object]) -> bool:
    """Return whether a stored index was built from a file with another size or modification time.

    Args:
        about_file: the index's about.json.
        stamp: the file's size and modification time now.
    """
    try:
        stored = read_json(about_file)
        return any(stored[name] != value for name, value in stamp.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_arrays(arrays: Arrays, index_folder: Path, settings: dict[str, object]) -> None:
    """Write arrays to a temporary directory, then rename it.

    Args:
        arrays: the arrays by name.
        index_folder: directory of the finished index.
        settings: settings to store with it, in its about.json.
    """
    temporary = index_folder.with_name(f"{index_folder.name}.{os.getpid()}.tmp")
    remove_stale_builds(index_folder)
    try:
        temporary.mkdir()
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        (temporary / "about.json").write_text(json.dumps({**settings, "arrays": shapes}, indent=1) + "\n", encoding="utf-8")
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        if index_folder.exists():
            shutil.rmtree(index_folder)  # damaged, since it could not be loaded
        os.rename(temporary, index_folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_stale_builds(index_folder: Path) -> None:
    """Remove temporary directories of killed builders: of this index, whose lock the caller holds, and of unlocked ones."""
    for left_over in index_folder.parent.glob("*.*.tmp"):
        name = left_over.name.split(".")[0]
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            if name != index_folder.name:
                held.enter_context(file_lock(index_folder.parent / f".{name}.lock", 0.0))
            shutil.rmtree(left_over, ignore_errors=True)


@contextlib.contextmanager
def file_lock(path: Path, timeout: float) -> Iterator[None]:
    """Hold a file lock inside the block; TimeoutError (an OSError) if another process holds it for `timeout` seconds."""
    # O_NOFOLLOW: in a shared directory someone may have planted a symlink. O_NONBLOCK: opening a pipe would block.
    with open(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)) as file:
        start = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - start > timeout:
                    raise TimeoutError(f"another process has been building {path.name} for {timeout:.0f} s") from None
                time.sleep(0.05)
        yield
