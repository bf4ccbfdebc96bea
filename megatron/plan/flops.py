"""FLOPs of a model, whole and per stage, as its modules say them by `flops`.

A layer with a heads of width d, a d = h and f = 4 h takes 24 h^2 + 4 s h a token, as in the appendix of arXiv 2104.04473: there
24 B s h^2 + 4 B s^2 h for a batch of B sequences. Attention counts the whole square, as there and in Megatron-LM of 2023,
although causality needs only half of it; see `causal_flops_per_token`. In all functions `seq` is the tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.contract import StagePart
from megatron.parallel.cost import Flops, module_flops
from megatron.plan.size import MetaModel


def layer_flops(model: MetaModel, seq: int, part: StagePart) -> Flops:
    """Return the FLOPs of one token's forward pass through the layers of a stage.

    Args:
        model: gives one layer of each kind.
        seq: tokens of a sample, all of which attention looks at.
        part: the stage's layers.

    Returns:
        FLOPs a token: of products with weights, and of attention's scores and weighted sums.
    """
    found = Flops()
    for layer, count in model.layers(part).items():
        each = module_flops(layer, seq)
        found += Flops(count * each.linear, count * each.core)
    return found


def head_flops(model: MetaModel, seq: int, part: StagePart) -> int:
    """Return the FLOPs of one token's forward pass through what a stage has beside its layers: through the output layer.

    Args:
        model: gives the stage's ends.
        seq: tokens of a sample.
        part: says which ends the stage has; 0 for one without the head.
    """
    return module_flops(model.ends(part), seq).total


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one token in a stage: forward; backward to the stage's input; backward to its weights."""

    forward: int
    backward: int
    weight: int


def stage_flops(model: MetaModel, seq: int, part: StagePart) -> StageFlops:
    """Return what each action of a stage computes; over all stages the sum is `flops_per_token`.

    Args:
        model: gives the stage's modules.
        seq: tokens of a sample.
        part: the stage.
    """
    layers, head = layer_flops(model, seq, part), head_flops(model, seq, part)
    # A product with a weight has one product for each gradient; scores and weighted sum have two inputs each, and no weight.
    # The output layer does all three of its products in the forward pass: the loss comes with its gradients.
    return StageFlops(layers.total + 3 * head, layers.linear + 2 * layers.core, layers.linear)


def flops_per_token(model: MetaModel, seq: int) -> int:
    """Return the FLOPs of training on one token."""
    # The backward pass has two products for each one of the forward pass. What recomputation runs again does not count, as in
    # the model FLOPs of arXiv 2205.05198.
    return 3 * (layer_flops(model, seq, model.whole).total + head_flops(model, seq, model.whole))


def causal_flops_per_token(model: MetaModel, seq: int) -> int | None:
    """Return `flops_per_token` with half of the scores and of the weighted sums, as the tables of Megatron-Core and NeMo count.

    Half means s / 2 of s positions, as there. None for BERT, whose tokens see one another in both directions.
    """
    if not model.causal:
        return None
    return flops_per_token(model, seq) - 3 * layer_flops(model, seq, model.whole).core // 2
