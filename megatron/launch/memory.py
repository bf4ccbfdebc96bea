"""Estimate the free memory of this host, and describe out-of-memory errors. Imports no torch.

It is limited by the memory that Linux reports as available, and by the control groups of this process, as containers and jobs
have them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_MESSAGE_LENGTH = 400  # characters of an allocator's message
# Parts of the messages of failed allocations, by torch on the host, torch on a GPU, or the C library.
ALLOCATION_ERRORS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "Unable to allocate",
)


@dataclass(frozen=True)
class HostMemory:
    """Memory of this host that processes can still allocate.

    Attributes:
        free: free memory in bytes.
        description: total and free memory, for a message.
    """

    free: int
    description: str


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Return the free memory for this process and its siblings; None if the system does not report it.

    This is an upper estimate: all free swap counts, and in a control group all memory but the processes' anonymous pages.
    """
    meminfo = _table(root / "proc/meminfo")
    if "MemAvailable" not in meminfo:
        return None
    swap = 1024 * meminfo.get("SwapFree", 0)
    free, total = 1024 * meminfo["MemAvailable"], 1024 * meminfo.get("MemTotal", 0)
    swap_text = f", and {format_gib(swap)} of swap" if swap else ""
    limits = [HostMemory(free + swap, f"this host has {format_gib(total)}, of which {format_gib(free)} are free{swap_text}")]
    for maximum, used in _groups(root):
        group_free = max(0, maximum - used) + swap
        text = f"the control group of this process has {format_gib(maximum)}, of which {format_gib(used)} are used"
        limits.append(HostMemory(group_free, text))
    return min(limits, key=lambda limit: limit.free)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and used memory, in bytes, of each control group with a limit: that of this process, and all around it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        # Version 2 of control groups has a single hierarchy, whose list of controllers is empty in this file.
        is_v2 = controllers == ""
        if not is_v2 and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("" if is_v2 else "memory")
        limit, used = ("memory.max", "anon") if is_v2 else ("memory.limit_in_bytes", "total_rss")
        parts = [part for part in group.split("/") if part not in ("", "..")]
        # The limits of enclosing groups apply as well, up to the root.
        for depth in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:depth])
            with suppress(ValueError):  # the limit is `max`, or the group's files are not visible in this container
                yield int(_text(folder / limit)), _table(folder / "memory.stat").get(used, 0)


def _table(path: Path) -> dict[str, int]:
    """Read one of the kernel's tables, whose rows are a name, an optional colon, and a number."""
    rows = [line.replace(":", " ").split() for line in _text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    """Return the content of a file; an empty text if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def format_gib(count: float) -> str:
    """Return a number of bytes as text in GiB: `1.5 GiB`."""
    return f"{count / 2**30:.1f} GiB"


def out_of_memory_message(error: BaseException) -> str:
    """Return the message for an out-of-memory error of the host or a GPU; an empty text for any other error."""
    text = " ".join(str(error).split())
    classes = {base.__name__ for base in type(error).__mro__}
    from_allocator = "RuntimeError" in classes and any(part in text for part in ALLOCATION_ERRORS)
    is_memory_error = bool(classes & {"MemoryError", "OutOfMemoryError"})
    if not from_allocator and not is_memory_error and getattr(error, "errno", None) != errno.ENOMEM:
        return ""
    # Remove the source location in torch's message, and its long advice on fragmentation.
    text = text.partition(" If reserved but unallocated")[0].rpartition("DefaultCPUAllocator: ")[2]
    host = host_memory()
    free = "" if host is None or "CUDA" in text else f"; {host.description}"  # a GPU's message contains its own numbers
    return f"out of memory: {text[:MAX_MESSAGE_LENGTH] or type(error).__name__}{free}"
