"""Keep the host memory that a step frees, so that the next step need not fetch it from the system again.

A training step on a CPU allocates and frees the same large tensors over and over. By default glibc gives large blocks
back to the system at once, and the kernel clears each page anew when it is next used: a tenth of a small model's step.
GPU tensors have torch's caching allocator for the same purpose.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed; return whether there is a glibc that listens.

    The resident size of the process then stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library: everything works, a little slower
        return False
    # No block comes from mmap, which would go back when freed, and the top of the heap is never trimmed.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
