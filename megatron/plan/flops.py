"""FLOPs of a model, whole and per stage, summed from the `flops` methods of its modules.

A layer with `a` heads of width `d`, hidden size h = a d and MLP width 4 h takes 24 h^2 + 4 s h FLOPs per token of a sequence
of length s. This is the formula in the appendix of arXiv 2104.04473, 24 B s h^2 + 4 B s^2 h for B sequences. All s x s
attention scores count, as in that paper and in Megatron-LM of 2023, although causal attention needs only half of them; see
`causal_flops_per_token`. In all functions `seq` is the sequence length in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.contract import StagePart
from megatron.parallel.cost import Flops, module_flops
from megatron.plan.size import MetaModel


def layer_flops(model: MetaModel, seq: int, part: StagePart) -> Flops:
    """Return the FLOPs of one token's forward pass through the layers of a stage.

    Args:
        model: the model, which has one layer of each kind.
        seq: the sequence length; each token attends to all of it.
        part: the stage; only its layers count.

    Returns:
        FLOPs per token: `linear` for products with weights, `core` for attention's scores and weighted sums.
    """
    total = Flops()
    for layer, count in model.layers(part).items():
        per_layer = module_flops(layer, seq)
        total += Flops(count * per_layer.linear, count * per_layer.core)
    return total


def head_flops(model: MetaModel, seq: int, part: StagePart) -> int:
    """Return the FLOPs of one token's forward pass through a stage's output head; 0 if the stage has none.

    Args:
        model: the model.
        seq: the sequence length.
        part: the stage; only the modules beside its layers count.
    """
    return module_flops(model.ends(part), seq).total


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one token in a stage.

    Attributes:
        forward: the forward pass, and the output head's backward pass, which runs with it.
        backward: the gradients of the layers' inputs.
        weight: the gradients of the layers' weights.
    """

    forward: int
    backward: int
    weight: int


def stage_flops(model: MetaModel, seq: int, part: StagePart) -> StageFlops:
    """Return the FLOPs of each action of a stage; summed over all actions and stages they are `flops_per_token`.

    Args:
        model: the model.
        seq: the sequence length.
        part: the stage.
    """
    layers, head = layer_flops(model, seq, part), head_flops(model, seq, part)
    # The backward pass of a product with a weight is two products, for the input's and for the weight's gradient. Attention's
    # products have two inputs and no weight, so both of their backward products count as `backward`. The output layer computes
    # its gradients in the forward pass, together with the loss: three products.
    return StageFlops(layers.total + 3 * head, layers.linear + 2 * layers.core, layers.linear)


def flops_per_token(model: MetaModel, seq: int) -> int:
    """Return the FLOPs of training on one token."""
    # The backward pass has two products for each one of the forward pass. Recomputed activations do not count: these are the
    # model FLOPs of arXiv 2205.05198, not its hardware FLOPs.
    return 3 * (layer_flops(model, seq, model.whole).total + head_flops(model, seq, model.whole))


def causal_flops_per_token(model: MetaModel, seq: int) -> int | None:
    """Return `flops_per_token` with half of attention's FLOPs, the convention of Megatron-Core's and NeMo's tables.

    A token then attends to s / 2 of s positions. None for BERT, whose attention is not causal.
    """
    if not model.causal:
        return None
    return flops_per_token(model, seq) - 3 * layer_flops(model, seq, model.whole).core // 2
