"""The specification that is attached to every parameter.

Initialisation, gradient reduction, the gradient norm, weight decay, checkpoints and the Hugging Face export all read this
record and have no special cases of their own. A parameter's name and whole shape are global, the same in every parallel
layout; each rank has one rectangle of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.mesh.grid import is_within_stage

DECOUPLED = ("embedding.word.weight", "head.weight")  # the parameters to which --decoupled-lr applies


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor: its start and its shape in each dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the whole tensor that selects the rectangle."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    @property
    def empty(self) -> bool:
        """True if the rectangle has no elements."""
        return 0 in self.shape

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        """Return the rectangle that covers a whole tensor of `shape`."""
        return cls((0,) * len(shape), shape)


@dataclass(frozen=True)
class ParameterSpec:
    """Identity and treatment of one parameter.

    Attributes:
        name: global name, for example `layers.7.attention.qkv.weight`, with the layer's number in the whole model.
        shape: shape of the whole parameter, without padding.
        part: this rank's rectangle. The local tensor may be longer in dimension 0: the additional rows are padding of the
            vocabulary, which is always zero and does not belong to the parameter.
        split_over: axes whose ranks have different rectangles.
        sum_grad_over: axes, besides data_axis, whose ranks have copies that process different parts of the work, so that their
            gradients must be summed.
        decay: whether weight decay applies.
        init: name of the rule in `model/init.py` that initialises it.
        decoupled: whether its learning rate is that of --decoupled-lr.
        data_axis: the axis whose ranks have copies that process different samples. Gradients are summed over it, and under the
            distributed optimizer each of its ranks owns a slice of the parameter's optimizer state.
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
        """Return the spec for a run with --decoupled-lr."""
        return replace(self, decoupled=self.name in DECOUPLED)

    @property
    def bucket_kind(self) -> Hashable:
        """Key that is equal for parameters that may share a bucket, in addition to dtype and update rule.

        Ranks that sum the gradients of a bucket must have the same bucket. The ranks of one stage have the same parameters, but
        different stages have only a tied matrix in common, so its copies get a bucket of their own.
        """
        between_stages = frozenset(axis for axis in self.sum_grad_over if not is_within_stage(axis))
        return self.data_axis, between_stages, self.decay, self.decoupled

    def local(self, tensor: Tensor) -> Tensor:
        """Return the view of a local tensor without padding, of the shape of `part`."""
        return tensor[tuple(slice(0, n) for n in self.part.shape)]


def describe(parameter: nn.Parameter, spec: ParameterSpec) -> nn.Parameter:
    """Attach `spec` to `parameter`, in place of an earlier one, and return the parameter."""
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def param_spec(parameter: Tensor) -> ParameterSpec:
    """Return the spec attached by `describe`. AttributeError when there is none."""
    spec: ParameterSpec = parameter.spec  # type: ignore[attr-defined]
    return spec


def name_parameters(module: nn.Module) -> None:
    """Set the name of every spec without one to the parameter's path in `module`, which contains global layer numbers."""
    for name, parameter in module.named_parameters():
        if not param_spec(parameter).name:
            describe(parameter, replace(param_spec(parameter), name=name))


def accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add `grad` to the parameter's gradient as autograd would: to its gradient buffer `main_grad` if it has one."""
    total = getattr(parameter, "main_grad", parameter.grad)
    if total is None:
        parameter.grad = grad
    else:
        total.add_(grad)
    run_grad_ready_hook(parameter)


def register_grad_ready_hook(parameter: nn.Parameter, hook: Callable[[], None]) -> None:
    """Make `hook` run after each gradient that autograd or `accumulate` adds to the parameter."""
    parameter.grad_ready_hook = hook  # type: ignore[attr-defined]
    parameter.register_post_accumulate_grad_hook(run_grad_ready_hook)  # type: ignore[no-untyped-call]


def run_grad_ready_hook(parameter: Tensor) -> None:
    """Call the parameter's grad-ready hook, if it has one, after a gradient was added."""
    hook: Callable[[], None] | None = getattr(parameter, "grad_ready_hook", None)
    if hook is not None:
        hook()


@dataclass(frozen=True)
class Shard:
    """One rectangle of a named tensor, as the unit of saving and loading.

    Attributes:
        name: name of the tensor within its checkpoint part.
        shape: shape of the whole tensor.
        part: the rectangle.
        split_over: axes whose ranks have different rectangles.
        data: view of the live state, of exactly `part.shape`: saving reads it, loading writes to it.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    split_over: frozenset[str]
    data: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.data.dtype


class Checkpointable(Protocol):
    """State that is saved and loaded: tensors as shards with global names, and small JSON values."""

    def shards(self) -> Iterator[Shard]:
        """Yield all of this rank's shards, including those of which other ranks have copies."""
        ...

    def scalars(self) -> dict[str, Any]:
        """Return small JSON values, equal on all ranks."""
        ...

    def load_scalars(self, values: Mapping[str, Any]) -> None:
        """Restore the values that `scalars` returned. The loader calls this after it has filled the shards."""
        ...
