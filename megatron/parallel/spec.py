"""The description that every parameter carries of itself.

Initialisation, gradient reduction, the norm, weight decay, checkpoints and the Hugging Face export all read this one
record; none keeps its own special cases. A parameter has a global identity, its name and whole shape, which is the
same in every layout, and each rank holds one rectangle of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.mesh.grid import is_within_stage

DECOUPLED = ("embedding.word.weight", "head.weight")  # what --decoupled-lr is for


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor: where it starts and how far it reaches, per dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rectangle as an index of the whole tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    @property
    def empty(self) -> bool:
        """True where it has no element."""
        return 0 in self.shape

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        """Return the part that is all of a tensor of `shape`."""
        return cls((0,) * len(shape), shape)


@dataclass(frozen=True)
class ParameterSpec:
    """Identity of one parameter.

    Attributes:
        name: global, e.g. `layers.7.attention.qkv.weight`; layers counted over the whole model.
        shape: of the whole parameter, without padding.
        part: the rectangle this rank holds. The local tensor can be longer in dimension 0: the surplus is padding (of the
            vocabulary), always zero, and no part of the parameter.
        split_over: axes whose ranks hold different rectangles.
        data_axis: the axis whose ranks hold equal copies that saw other samples. Its gradients are summed there, and under the
            distributed optimizer each of these ranks owns a slice of its state.
        sum_grad_over: further axes whose ranks hold equal copies that saw different parts of the work, so that their gradients
            must be summed too.
        decay: whether weight decay applies.
        decoupled: whether its learning rate is that of --decoupled-lr.
        init: the rule of `model/init.py` that draws it.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    split_over: frozenset[str] = frozenset()
    sum_grad_over: frozenset[str] = frozenset()
    decay: bool = True
    init: str = "normal"
    decoupled: bool = False
    data_axis: str = "dp_cp"

    def with_own_rate(self) -> ParameterSpec:
        """Return the spec of a run with --decoupled-lr."""
        return replace(self, decoupled=self.name in DECOUPLED)

    @property
    def bucket_kind(self) -> Hashable:
        """Key that the parameters of one bucket of the optimizer's memory share, beside dtype and rule of update.

        Ranks that sum a bucket's gradients must have laid it out alike. Those of one stage have the same parameters; those of
        several stages share a tied matrix alone, so its copies have a bucket of their own.
        """
        between_stages = frozenset(axis for axis in self.sum_grad_over if not is_within_stage(axis))
        return self.data_axis, between_stages, self.decay, self.decoupled

    def local(self, tensor: Tensor) -> Tensor:
        """Return the view of a local tensor that holds `part`, i.e. without padding."""
        return tensor[tuple(slice(0, n) for n in self.part.shape)]


def describe(parameter: nn.Parameter, spec: ParameterSpec) -> nn.Parameter:
    """Attach `spec` to `parameter`; the layer that makes a parameter calls this once."""
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def param_spec(parameter: Tensor) -> ParameterSpec:
    """Return the record attached by `describe`. AttributeError when there is none."""
    spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
    return spec


def name_parameters(module: nn.Module) -> None:
    """Give the specs that have none their global names: the module tree's paths, since layers are keyed by global number."""
    for name, parameter in module.named_parameters():
        if not param_spec(parameter).name:
            describe(parameter, replace(param_spec(parameter), name=name))


def accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add `grad` to the parameter's gradient as autograd would: in the buffer that the optimizer reads, where there is one."""
    total = getattr(parameter, "main_grad", parameter.grad)
    if total is None:
        parameter.grad = grad
    else:
        total.add_(grad)
    run_grad_ready_hook(parameter)


def register_grad_ready_hook(parameter: nn.Parameter, hook: Callable[[], None]) -> None:
    """Call `hook` after each gradient that is added to the parameter, by autograd or by `accumulate`."""
    parameter.grad_ready_hook = hook  # type: ignore[attr-defined]
    parameter.register_post_accumulate_grad_hook(run_grad_ready_hook)  # type: ignore[no-untyped-call]


def run_grad_ready_hook(parameter: Tensor) -> None:
    """Call the parameter's grad-ready hook, if it has one: a gradient was added."""
    hook: Callable[[], None] | None = getattr(parameter, "grad_ready_hook", None)
    if hook is not None:
        hook()


@dataclass(frozen=True)
class Shard:
    """One rectangle of one named tensor, as a checkpoint sees it.

    Attributes:
        data: the local tensor of exactly `part.shape`, a view of the live state: reading it saves, writing it loads.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    split_over: frozenset[str]
    data: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.data.dtype


class Checkpointable(Protocol):
    """State that is saved and loaded: tensors as shards with global names, and small JSON values."""

    def shards(self) -> Iterator[Shard]:
        """Yield every tensor of the state that this rank holds, also those that other ranks hold as well."""
        ...

    def scalars(self) -> dict[str, Any]:
        """Return small JSON values, equal on all ranks."""
        ...

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave; called after the shards were filled."""
        ...
