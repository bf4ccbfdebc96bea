"""Sizes of a model, read from its own modules.

The modules are built on the meta device, where tensors have shapes but no storage. Only one layer of each kind is built, so
that a thousand equal layers cost no more than one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from megatron.config.schema import ModelConfig, RunConfig
from megatron.contract import StagePart
from megatron.mesh.mesh import Axis
from megatron.model.build import model_class
from megatron.model.transformer import Transformer
from megatron.parallel.ring import RingAttention
from megatron.parallel.spec import ParameterSpec, param_spec
from megatron.parallel.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class ParameterSize:
    """A parameter on one rank. local: elements that the rank holds, with the padding rows of a vocabulary."""

    spec: ParameterSpec
    local: int

    @property
    def name(self) -> str:
        """The parameter's global name."""
        return self.spec.name

    @property
    def count(self) -> int:
        """Elements of the whole parameter, without padding."""
        return prod(self.spec.shape)


class MetaModel:
    """A model on the meta device, as the first of `tp` ranks holds it.

    Each kind of layer, and each combination of embedding and head beside the layers, is built once, when it is first needed.
    """

    def __init__(self, config: ModelConfig, tp: int = 1, *, sequence_parallel: bool = False, cp: int = 1) -> None:
        """Prepare the model; its modules are built later.

        Args:
            config: the resolved configuration, with vocab_size set.
            tp: the tensor-parallel size.
            sequence_parallel: whether activations between the tensor-parallel layers are sharded along the sequence.
            cp: the context-parallel size.
        """
        self.config, self.tp = config, TensorParallel(Axis("tp", tp, 0, tuple(range(tp))), sequence_parallel)
        self.whole = StagePart(range(config.num_layers))
        self._model_class = model_class(config)
        axis = Axis("cp", cp, 0, tuple(range(cp)))
        self._core_attention = RingAttention(axis, causal=self._model_class.causal) if cp > 1 else None
        self._ends: dict[tuple[bool, bool], Transformer] = {}
        self._layers: dict[Hashable, nn.Module] = {}

    @classmethod
    def from_config(cls, config: RunConfig) -> MetaModel:
        """Return the model of a run, as its layout shards it."""
        layout = config.layout
        sequence_parallel, cp = layout.sequence_parallel, layout.context_parallel_size
        return cls(config.model, layout.tensor_model_parallel_size, sequence_parallel=sequence_parallel, cp=cp)

    def ends(self, part: StagePart) -> Transformer:
        """Return the modules of a stage beside its layers, as a model without layers."""
        key = (part.embedding, part.head)  # the modules beside the layers depend on nothing else
        if key not in self._ends:
            self._ends[key] = self._build(StagePart(range(0), *key))
        return self._ends[key]

    def layer(self, number: int) -> nn.Module:
        """Return the layer that was built for the kind of layer `number`; its own number may be another."""
        kind = self._model_class.layer_kind(self.config, number)
        if kind not in self._layers:
            self._layers[kind] = self._build(StagePart(range(number, number + 1), False, False)).layers[str(number)]
        return self._layers[kind]

    def layers(self, part: StagePart) -> Mapping[nn.Module, int]:
        """Return one layer of each kind in a stage -> the number of the stage's layers of that kind."""
        return Counter(self.layer(number) for number in part.layers)

    @property
    def causal(self) -> bool:
        """True if a token attends only to itself and to earlier ones."""
        return self._model_class.causal

    def parameters(self, part: StagePart | None = None) -> Iterator[ParameterSize]:
        """Yield every parameter of a stage, by default of the whole model, in the order in which the stage holds them.

        A tied output layer on a stage without the embedding holds a copy of it, under the embedding's name.
        """
        part = part or self.whole
        for name, module in self.ends(part).named_children():
            if name != "layers":
                yield from _sizes(module)
                continue
            for number in part.layers:
                for size in _sizes(self.layer(number)):
                    # The layer was perhaps built for another number, N of the parameter's name "layers.N.<rest>".
                    rest = size.name.split(".", 2)[2]
                    yield ParameterSize(replace(size.spec, name=f"{name}.{number}.{rest}"), size.local)

    def count(self, part: StagePart | None = None) -> int:
        """Return the number of parameters of a stage, by default of the whole model, without padding and before sharding."""
        return sum(p.count for p in self.parameters(part))

    def _build(self, part: StagePart) -> Transformer:
        return self._model_class(self.config, part, self.tp, core_attention=self._core_attention, device="meta")


def _sizes(module: nn.Module) -> Iterator[ParameterSize]:
    for parameter in module.parameters():
        yield ParameterSize(param_spec(parameter), parameter.numel())
