"""Memory that the ranks of one host share: pairwise channels for tensors, and a loop that moves what is under way.

gloo takes a millisecond for what two processes of one host can copy in some ten microseconds. So ranks of a host talk through
one anonymous file in memory (memfd). It has no name that could outlive its processes, and none of its pages is used before
it is written.

A *channel* carries tensors from one rank to another, in slots of a ring. Its writer alone advances `written`, its reader alone
`read`, so neither needs a lock. An operation is a generator that copies what it can and yields where it has to wait for
another rank. Whoever waits for one operation moves all that are under way, so ranks may wait in different orders.

Every message's slot is filled before its count is advanced, and x86 processors show stores to others in the order in which
they were made. Others may not, so this file is used on x86 under Linux alone (`unsupported`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line: what two ranks write never shares one
PAGE = 4096
SLOT = 128 << 10  # bytes of a slot; some of them fit into a core's cache together
MAX_SLOTS, MIN_SLOTS = 32, 2  # of a channel
MAX_BYTES = 128 << 20  # of all channels of a group, so that many ranks have shorter rings
MIN_SPINS = 50
MAX_SPINS = 2000  # looks at the bell before a rank sleeps: some 100 microseconds, what the kernel takes to wake it
SLEEP = 0.05  # seconds between looks at whether the others are alive
FUTEX_WAIT, FUTEX_WAKE, SYS_FUTEX = 0, 1, 202  # linux/futex.h, and the call's number on x86-64

Steps = Generator[None, None, None]  # copies what it can, and yields where it has to wait for another rank


def unsupported() -> str | None:
    """Return why this machine's processes cannot share memory in this way; None where they can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"it needs Linux on x86-64, not {sys.platform} on {platform.machine()}"
    if not hasattr(os, "pidfd_open"):
        return "this Python was built without pidfd_open"
    return None


def host_identity() -> str:
    """Return what two processes have in common if and only if they can share memory: kernel, namespaces and user.

    Processes of two network namespaces count as two hosts, as containers do.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        parts = [file.read().strip(), str(os.getuid())]
    return " ".join(parts + [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")])


class Operation:
    """A collective or a transfer under way.

    Attributes:
        done: this rank's part is done.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps, self.done = steps, False

    def move(self) -> bool:
        """Do what can be done without waiting; return whether the operation is done."""
        try:
            next(self._steps)
        except StopIteration:
            self.done = True
        return self.done


class Bell:
    """A word of shared memory on which one rank sleeps and that the others change to wake it (a futex).

    Args:
        memory: the segment.
        offset: of the word, in bytes.
        rings: a number for each ring that no other rank uses: the word never takes the value that the sleeper saw.
    """

    def __init__(self, memory: mmap.mmap, offset: int, rings: Iterable[int]) -> None:
        self._word = memoryview(memory)[offset : offset + 4].cast("I")
        self._address = ctypes.c_void_p(ctypes.addressof(ctypes.c_uint32.from_buffer(memory, offset)))
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._rings = iter(rings)

    @property
    def value(self) -> int:
        """The word as it is now."""
        return self._word[0]

    def spin(self, seen: int, times: int) -> bool:
        """Look at the word so many times at most; return whether it is another than `seen`."""
        word = self._word
        return any(word[0] != seen for _ in range(times))

    def ring(self) -> None:
        """Change the word, and wake the rank that sleeps on it."""
        self._word[0] = next(self._rings)
        self._call(SYS_FUTEX, self._address, FUTEX_WAKE, 1, None, None, 0)

    def sleep(self, seen: int, seconds: float) -> None:
        """Sleep until the word is another than `seen`, or for some seconds. May return early."""
        limit = (ctypes.c_long * 2)(int(seconds), int(seconds % 1 * 1e9))  # struct timespec
        self._call(SYS_FUTEX, self._address, FUTEX_WAIT, seen, ctypes.byref(limit), None, 0)


class Channel:
    """A ring of slots that carries tensors from one rank to another.

    Args:
        memory: the segment.
        offset: of the channel in it.
        slots: number of slots.
        bell: of the rank at the other end.
    """

    def __init__(self, memory: mmap.mmap, offset: int, slots: int, bell: Bell) -> None:
        self._words = memoryview(memory)[offset : offset + PAGE].cast("Q")
        self._data = torch.frombuffer(memory, dtype=torch.uint8, count=slots * SLOT, offset=offset + PAGE)  # [slots * SLOT]
        self._slots, self._bell = slots, bell
        self._views: dict[torch.dtype, Sequence[Tensor]] = {}

    # Counts of messages, each on a cache line of its own; behind them the bytes of the message in each slot.
    _WRITTEN, _READ, _SIZES = 0, LINE // 8, 2 * LINE // 8

    @staticmethod
    def bytes_for(slots: int) -> int:
        """Return the bytes of a channel: a page of counts, and its slots."""
        return PAGE + slots * SLOT

    def _slot(self, number: int, dtype: torch.dtype) -> Tensor:
        if dtype not in self._views:
            self._views[dtype] = self._data.view(dtype).view(self._slots, -1).unbind()
        return self._views[dtype][number % self._slots]

    def has_room(self) -> bool:
        """Return whether a message can be written now."""
        return self._words[self._WRITTEN] - self._words[self._READ] < self._slots

    def write(self, piece: Tensor) -> None:
        """Write a message `[n]` of at most a slot. Needs room."""
        number, count = self._words[self._WRITTEN], piece.numel()
        self._slot(number, piece.dtype)[:count].copy_(piece)
        self._words[self._SIZES + number % self._slots] = count * piece.element_size()
        self._words[self._WRITTEN] = number + 1
        self._bell.ring()

    def has_message(self) -> bool:
        """Return whether there is a message to read."""
        return self._words[self._WRITTEN] > self._words[self._READ]

    def peek(self, like: Tensor) -> Tensor:
        """Return the next message `[n]`, which stays in the ring until `release`.

        Raises:
            RuntimeError: it has another size than `like`, so the ranks do not do the same.
        """
        number, count = self._words[self._READ], like.numel()
        size = self._words[self._SIZES + number % self._slots]
        if size != count * like.element_size():
            raise RuntimeError(f"shared memory: {size} bytes came where {count * like.element_size()} were expected")
        return self._slot(number, like.dtype)[:count]

    def release(self) -> None:
        """Let the slot of the next message be written again."""
        self._words[self._READ] += 1
        self._bell.ring()


@dataclass(frozen=True)
class Neighbors:
    """The processes of the ranks of one host.

    Attributes:
        ranks: global ranks, in rising order.
        pids: their process numbers.
        rank: this process's global rank.
    """

    ranks: tuple[int, ...]
    pids: tuple[int, ...]
    rank: int


class SharedSegment:
    """The segment that the ranks of this host share, and the operations of this rank that are under way in it.

    Args:
        neighbors: the ranks of this host.
        file: descriptor of the memfd; it is not needed afterwards.
        size: bytes of the segment.
    """

    def __init__(self, neighbors: Neighbors, file: int, size: int) -> None:
        self.neighbors = neighbors
        self._memory = mmap.mmap(file, size)
        count, place = len(neighbors.ranks), neighbors.ranks.index(neighbors.rank)
        # Each rank has numbers of its own for ringing. 32 bits come round after hundreds of millions of rings of one rank.
        mine = range(place + count, 1 << 32, count)
        self._bells = [Bell(self._memory, LINE * (1 + number), _for_ever(mine)) for number in range(count)]
        self._own_bell = self._bells[place]
        self._lives = {rank: os.pidfd_open(pid) for rank, pid in zip(neighbors.ranks, neighbors.pids, strict=True)}
        self._finalizer = weakref.finalize(self, _close_all, list(self._lives.values()))
        self._queues: list[deque[Operation]] = []
        self._lock = threading.RLock()
        # A rank that spins on a core that another rank needs keeps it waiting.
        self._max_spins = MAX_SPINS if len(os.sched_getaffinity(0)) >= count else 0
        self._spins = self._max_spins

    @staticmethod
    def bells_bytes(count: int) -> int:
        """Return the bytes in front of the channels: a line for the handshake, and a bell for each rank, in whole pages."""
        return -(-LINE * (1 + count) // PAGE) * PAGE

    def channel(self, offset: int, slots: int, other: int) -> Channel:
        """Return an end of the channel at an offset; `other` is the global rank at the other end."""
        return Channel(self._memory, offset, slots, self._bells[self.neighbors.ranks.index(other)])

    def queue(self) -> deque[Operation]:
        """Return a new queue of operations, of which one after the other is moved."""
        queue: deque[Operation] = deque()
        self._queues.append(queue)
        return queue

    def start(self, queue: deque[Operation], operation: Operation) -> None:
        """Put an operation behind those of its queue, and let it do what it can at once."""
        with self._lock:
            queue.append(operation)
            if len(queue) == 1:
                self._move(queue)

    def _move(self, queue: deque[Operation]) -> None:
        """Move a queue's operations until the first has to wait."""
        while queue and queue[0].move():
            queue.popleft()

    def wait(self, operation: Operation, ranks: Sequence[int], limit: timedelta | None) -> None:
        """Move everything under way until an operation is done.

        Args:
            operation: one that was started.
            ranks: global ranks that take part in it.
            limit: the time that it may take; None for ever.

        Raises:
            RuntimeError: one of the ranks has ended, or time is up.
        """
        deadline = time.monotonic() + limit.total_seconds() if limit else float("inf")
        while True:
            seen = self._own_bell.value  # before the channels are looked at, so that no ring goes unheard
            with self._lock:
                for queue in self._queues:
                    self._move(queue)
            if operation.done:
                return
            if self._own_bell.spin(seen, self._spins):
                self._spins = min(2 * self._spins, self._max_spins)
                continue
            # On a busy machine the ring does not come while this rank keeps the core: spin for shorter and shorter.
            self._spins = max(self._spins // 2, min(MIN_SPINS, self._max_spins))
            self._own_bell.sleep(seen, SLEEP)
            if self._own_bell.value == seen:
                self._check(ranks, deadline)

    def _check(self, ranks: Sequence[int], deadline: float) -> None:
        """Raise the error that gloo would, where a rank of an operation has ended or time is up."""
        poll = select.poll()
        for rank in ranks:
            poll.register(self._lives[rank], select.POLLIN)
        ended = {file for file, _ in poll.poll(0)}
        for rank in ranks:
            if self._lives[rank] in ended:
                raise RuntimeError(f"shared memory: connection closed by peer, rank {rank} has ended")
        if time.monotonic() > deadline:
            raise RuntimeError("shared memory: connection closed by peer, timed out waiting for another rank")


def _for_ever(numbers: range) -> Iterable[int]:
    while True:
        yield from numbers


def _close_all(files: Iterable[int]) -> None:
    for file in files:
        os.close(file)
