"""How much a GPT or BERT computes: FLOPs, whole and per stage. Pure arithmetic.

Arguments: `model` is resolved; `vocab` the true number of tokens; `seq` the tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema import ModelConfig
from megatron.contract import StagePart


def layer_flops(model: ModelConfig, seq: int) -> int:
    """FLOPs of one token's forward pass through one layer, matrix products alone, a multiplication and an addition being 2.

    With h hidden, a heads and g groups of width d, f the MLP's width, s the sequence:

        2 h (a + 2g) d    queries, keys, values
        2 s a d           scores, and as much again for the weighted sum of the values
        2 a d h           output projection
        2 h f  x 2        up and down; x 3 with the gate of SwiGLU

    With a d = h and f = 4 h this is 24 h^2 + 4 s h, the formula of arXiv 2104.04473. Attention counts the whole square, as
    there and in Megatron-LM of 2023, although causality needs only half of it; see `causal_flops_per_token`.
    """
    return _linear_flops(model) + _core_flops(model, seq)


def _linear_flops(model: ModelConfig) -> int:
    """The part of a layer's FLOPs that has weights."""
    hidden, ffn, kv = model.size("hidden_size"), model.size("ffn_hidden_size"), model.size("kv_channels")
    heads, groups = model.size("num_attention_heads"), model.size("num_query_groups")
    attention = 2 * hidden * (heads + 2 * groups) * kv + 2 * heads * kv * hidden
    return attention + 2 * hidden * ffn * (3 if model.activation == "swiglu" else 2)


def _core_flops(model: ModelConfig, seq: int) -> int:
    """The part without weights: scores, and the weighted sum of the values."""
    return 2 * 2 * seq * model.size("num_attention_heads") * model.size("kv_channels")


def head_flops(model: ModelConfig, vocab: int) -> int:
    """FLOPs of one token's logits; of BERT with the dense layer before them. A pooler and a task's head count as nothing."""
    if not model.predicts_words:
        return 0
    hidden = model.size("hidden_size")
    return 2 * hidden * vocab + (2 * hidden**2 if model.architecture == "bert" else 0)


def forward_flops_per_token(model: ModelConfig, vocab: int, seq: int) -> int:
    """FLOPs of one token's forward pass: every layer and the logits."""
    return model.size("num_layers") * layer_flops(model, seq) + head_flops(model, vocab)


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one token in a stage: forward; backward to the stage's input; backward to its weights."""

    forward: int
    backward: int
    weight: int


def stage_flops(model: ModelConfig, vocab: int, seq: int, stage: StagePart) -> StageFlops:
    """What each action of a stage computes; over all stages the sum is `flops_per_token`.

    A product with a weight has one product for each gradient; scores and weighted sum have two inputs each, and no
    weight. The output layer does all three of its products in the forward pass: the loss comes with its gradients.
    """
    layers, linear, core = len(stage.layers), _linear_flops(model), _core_flops(model, seq)
    head = 3 * head_flops(model, vocab) if stage.head else 0
    return StageFlops(layers * (linear + core) + head, layers * (linear + 2 * core), layers * linear)


def flops_per_token(model: ModelConfig, vocab: int, seq: int) -> int:
    """FLOPs of training on one token: the backward pass has two products for each one of the forward pass."""
    return 3 * forward_flops_per_token(model, vocab, seq)


def causal_flops_per_token(model: ModelConfig, vocab: int, seq: int) -> int | None:
    """`flops_per_token` with half of the scores and of the weighted sums, as the tables of Megatron-Core and NeMo count.

    Half means s / 2 of s positions, as there. None for BERT, whose tokens see one another in both directions.
    """
    if model.architecture == "bert":
        return None
    return flops_per_token(model, vocab, seq) - 3 * model.size("num_layers") * _core_flops(model, seq) // 2


def flops_per_iteration(model: ModelConfig, vocab: int, seq: int, global_batch: int) -> int:
    """FLOPs of one step over all ranks."""
    return flops_per_token(model, vocab, seq) * seq * global_batch
