"""Make malloc keep the host memory that a step frees, so that the next step need not fetch it from the system again.

A training step on a CPU allocates and frees the same large tensors over and over. By default glibc gives large blocks back to
the system at once, and the kernel clears each page again when it is next used; this takes a tenth of a small model's step. GPU
tensors have torch's caching allocator for the same purpose.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep freed memory; return whether that worked. The process's memory then stays at its peak."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library: everything works, a little slower
        return False
    # No block is allocated by mmap, which would return it when freed, and the top of the heap is never trimmed.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
