"""Measure the memory that this host can still give to processes, and describe out-of-memory errors. Imports no torch.

Linux reports the available memory, and the limits of the control groups of this process, such as those of containers and jobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_MESSAGE_LENGTH = 400  # characters of an allocator's message
# Parts of the messages of allocators: torch's for the host, torch's for a GPU, the system's.
ALLOCATORS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "Unable to allocate")


@dataclass(frozen=True)
class HostMemory:
    """Memory that processes of this host can still get.

    Attributes:
        free: bytes.
        description: total and free memory, for a message.
    """

    free: int
    description: str


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Return the free memory for this process and its siblings; None if the system does not report it.

    It is an upper estimate: all swap counts as free, and in a control group everything but the processes' own memory.
    """
    meminfo = _table(root / "proc/meminfo")
    if "MemAvailable" not in meminfo:
        return None
    swap = 1024 * meminfo.get("SwapFree", 0)
    free, total = 1024 * meminfo["MemAvailable"], 1024 * meminfo.get("MemTotal", 0)
    more = f", and {format_gib(swap)} of swap" if swap else ""
    found = [HostMemory(free + swap, f"this host has {format_gib(total)}, of which {format_gib(free)} are free{more}")]
    for maximum, used in _groups(root):
        left = max(0, maximum - used) + swap
        found.append(
            HostMemory(
                left, f"the control group of this process has {format_gib(maximum)}, of which {format_gib(used)} are taken"
            )
        )
    return min(found, key=lambda one: one.free)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and own memory, in bytes, of each control group that limits this process: its own and the enclosing ones."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        # Version 2 of control groups has one hierarchy, whose list of controllers is empty here.
        second = controllers == ""
        if not second and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("" if second else "memory")
        limit, own = ("memory.max", "anon") if second else ("memory.limit_in_bytes", "total_rss")
        parts = [part for part in place.split("/") if part not in ("", "..")]
        # The limits of enclosing groups apply as well, up to the root.
        for depth in range(len(parts), -1, -1):
            folder = base.joinpath(*parts[:depth])
            with suppress(ValueError):  # the limit is `max`, or a container does not show this group
                yield int(_text(folder / limit)), _table(folder / "memory.stat").get(own, 0)


def _table(path: Path) -> dict[str, int]:
    """Read one of the kernel's tables, each row of which is a name, sometimes a colon, and a number."""
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
    """Return the message for an allocation error of the host or a GPU; an empty text for any other error."""
    text = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    allocator = "RuntimeError" in kinds and any(part in text for part in ALLOCATORS)
    if not allocator and not kinds & {"MemoryError", "OutOfMemoryError"} and getattr(error, "errno", None) != 12:
        return ""
    # Remove the source location in torch's message, and its long advice on fragmentation.
    text = text.partition(" If reserved but unallocated")[0].rpartition("DefaultCPUAllocator: ")[2]
    there = host_memory()
    left = "" if there is None or "CUDA" in text else f"; {there.description}"  # a GPU's message has its own numbers
    return f"out of memory: {text[:MAX_MESSAGE_LENGTH] or type(error).__name__}{left}"
