"""Point-to-point transfers along the pipeline axis: posted first and waited for later, so that they overlap with computation.

Each direction has its own communicators: on a backend that processes a communicator's transfers in order, a receive that was
posted early must not delay a send. The number of a transfer is its tag, for backends that match by tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mesh.mesh import Axis, naming_communicator


class PendingReceive:
    """A tensor that is being received."""

    def __init__(self, work: Any, buffer: Tensor, device: torch.device) -> None:
        self._work, self._buffer, self._device = work, buffer, device

    def wait(self) -> Tensor:
        """Wait for the tensor, and return it on the device of the stage, in the requested shape `[...]`."""
        self._work.wait()
        return self._buffer.to(self._device, non_blocking=True)


class Channels:
    """One rank's ends of the channels to its neighbours.

    up: the pipeline axis, for what goes to higher ranks.
    back: the same axis with communicators of its own, for what goes to lower ranks.
    """

    def __init__(self, up: Axis, back: Axis, device: torch.device) -> None:
        self.up, self.back, self.device = up, back, device
        by_host = up.group is not None and device.type == "cuda" and dist.get_backend(up.group) == "gloo"
        self.memory = torch.device("cpu") if by_host else device
        self._sending: dict[int, tuple[Any, Tensor]] = {}  # keeps the tensors alive until they have been sent

    def connect(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Open the communicators of all channels. Collective.

        A backend that connects at first use would otherwise block in the middle of a step. JobError names the one that fails.
        pairs: (sender, receiver) of each channel, in the same order on all ranks.
        """
        for sender, receiver in pairs:
            axis = self._axis(sender, receiver)
            if axis.rank not in (sender, receiver):
                continue
            token, ends = torch.zeros(1, device=self.memory), (axis.ranks[sender], axis.ranks[receiver])
            with naming_communicator(axis.name, ends, axis.ranks[axis.rank]):
                if axis.rank == sender:
                    dist.send(token, ends[1], group=axis.group)
                else:
                    dist.recv(token, ends[0], group=axis.group)
                token.item()  # on a GPU, wait until the transfer has been made

    def _axis(self, sender: int, receiver: int) -> Axis:
        return self.up if sender < receiver else self.back

    def send(self, x: Tensor, peer: int, number: int) -> None:
        """Start to send, and return at once.

        Args:
            x: hidden states or their gradient, `[seq, batch, hidden]`.
            peer: pipeline rank of the receiver.
            number: number of the transfer, the same on both sides.
        """
        for done in [n for n, (work, _) in self._sending.items() if work.is_completed()]:
            del self._sending[done]
        x = x.to(self.memory).contiguous()  # [seq, batch, hidden]; gloo sends from host memory
        axis = self._axis(self.up.rank, peer)
        if axis.shared is not None:
            self._sending[number] = axis.shared.send(x, peer), x
        else:
            self._sending[number] = dist.isend(x, axis.ranks[peer], group=axis.group, tag=number), x

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, peer: int, number: int) -> PendingReceive:
        """Start to receive, and return at once.

        Args:
            shape: shape of the tensor, `[seq, batch, hidden]`.
            dtype: dtype of the tensor.
            peer: pipeline rank of the sender.
            number: number of the transfer, the same on both sides.
        """
        buffer = torch.empty(shape, dtype=dtype, device=self.memory)
        axis = self._axis(peer, self.up.rank)
        if axis.shared is not None:
            return PendingReceive(axis.shared.receive(buffer, peer), buffer, self.device)
        # Backends that match by order take no notice of the tag; gloo matches by it.
        work = dist.irecv(buffer, axis.ranks[peer], group=axis.group, tag=number)
        return PendingReceive(work, buffer, self.device)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Copy the tensor of pipeline rank `source` to `x` on every pipeline rank, and return `x`. Collective."""
        if self.up.size == 1:
            return x
        host = x.to(self.memory)
        if self.up.shared is not None:
            self.up.shared.broadcast(host, source).wait()
        else:
            dist.broadcast(host, self.up.ranks[source], group=self.up.group)
        return x.copy_(host)

    def wait_send(self, number: int) -> None:
        """Wait until a send is complete, and free its tensor. Return at once if there is no such send."""
        if number in self._sending:
            self._sending.pop(number)[0].wait()

    def wait_all_sends(self) -> None:
        """Wait for every send."""
        for number in list(self._sending):
            self.wait_send(number)
