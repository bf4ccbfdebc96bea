"""How large a GPT is and how much it computes: parameters, FLOPs and bytes, whole and per rank. Pure arithmetic.

The parameters are listed by the same names and shapes that `model/gpt.py` builds, so that the counts are those of a real
build. Arguments: `model` is resolved; `vocab` the true number of tokens; `tp` the tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from megatron.config.schema import ModelConfig

ALIGN = 64  # elements: each parameter starts on a 256-byte line of the flat buffers of `optim/buffers.py`
# Of the chunks in which `parallel/cross_entropy.py` works through the logits, on a GPU; a CPU's are no larger.
CHUNK = 1 << 27  # logits
FEWEST_ROWS = 256  # tokens, however many logits they have


class Stage(Protocol):
    """What of a model one pipeline stage owns; `contract.StagePart` is one."""

    @property
    def layers(self) -> range: ...
    @property
    def embedding(self) -> bool: ...
    @property
    def head(self) -> bool: ...


@dataclass(frozen=True)
class Slice:
    """`contract.StagePart` for pure files: layers by global number, and by default both ends of the model."""

    layers: range
    embedding: bool = True
    head: bool = True


@dataclass(frozen=True)
class ParameterSize:
    """A parameter: global name, whole shape, and whether tensor parallelism cuts it (dimension `cut`; None: a copy each)."""

    name: str
    shape: tuple[int, ...]
    cut: int | None = None
    vocabulary: bool = False

    @property
    def count(self) -> int:
        return prod(self.shape)

    def local(self, model: ModelConfig, tp: int) -> int:
        """Elements that each rank holds; of a vocabulary with the padding."""
        if self.vocabulary:
            return padded_vocabulary(model, self.shape[0], tp) // tp * self.shape[1]
        return self.count if self.cut is None else self.count // tp


def padded_vocabulary(model: ModelConfig, vocab: int, tp: int) -> int:
    """Megatron-LM's rule: the smallest multiple of make_vocab_size_divisible_by x tp that holds `vocab` tokens."""
    step = model.make_vocab_size_divisible_by * tp
    return -(-vocab // step) * step


def parameter_list(model: ModelConfig, vocab: int, stage: Stage | None = None) -> Iterator[ParameterSize]:
    """Every parameter of a stage; of the whole model by default. A tied output layer on a stage without the embedding
    holds a copy of it, under the embedding's name."""
    hidden = model.size("hidden_size")
    stage = stage or Slice(range(model.size("num_layers")))
    if stage.embedding:
        yield ParameterSize("embedding.word.weight", (vocab, hidden), 0, vocabulary=True)
        if model.position_embedding_type == "learned_absolute":
            yield ParameterSize("embedding.position.weight", (model.size("max_position_embeddings"), hidden))
    for layer in stage.layers:
        yield from _layer(model, f"layers.{layer}")
    if stage.head:
        yield from _norm(model, "final_norm")
        if model.untie_embeddings_and_output_weights:
            yield ParameterSize("head.weight", (vocab, hidden), 0, vocabulary=True)
        elif not stage.embedding:
            yield ParameterSize("embedding.word.weight", (vocab, hidden), 0, vocabulary=True)


def _layer(model: ModelConfig, name: str) -> Iterator[ParameterSize]:
    hidden, ffn, kv = model.size("hidden_size"), model.size("ffn_hidden_size"), model.size("kv_channels")
    heads, groups = model.size("num_attention_heads"), model.size("num_query_groups")
    yield from _norm(model, f"{name}.input_norm")
    yield from _linear(model, f"{name}.attention.qkv", (heads + 2 * groups) * kv, hidden, cut=0)
    yield from _linear(model, f"{name}.attention.dense", hidden, heads * kv, cut=1)
    yield from _norm(model, f"{name}.mlp_norm")
    for part in ("gate", "up") if model.activation == "swiglu" else ("up",):
        yield from _linear(model, f"{name}.mlp.{part}", ffn, hidden, cut=0)
    yield from _linear(model, f"{name}.mlp.down", hidden, ffn, cut=1)


def _linear(model: ModelConfig, name: str, rows: int, columns: int, *, cut: int) -> Iterator[ParameterSize]:
    yield ParameterSize(f"{name}.weight", (rows, columns), cut)
    if model.add_bias_linear:  # cut with the rows; a copy each where the columns are cut
        yield ParameterSize(f"{name}.bias", (rows,), 0 if cut == 0 else None)


def _norm(model: ModelConfig, name: str) -> Iterator[ParameterSize]:
    yield ParameterSize(f"{name}.weight", (model.size("hidden_size"),))
    if model.add_norm_bias and model.normalization == "LayerNorm":
        yield ParameterSize(f"{name}.bias", (model.size("hidden_size"),))


def parameters(model: ModelConfig, vocab: int, stage: Stage | None = None) -> int:
    """Parameters of a stage, or of the whole model; without padding, whatever the layout."""
    return sum(p.count for p in parameter_list(model, vocab, stage))


def parameters_per_rank(model: ModelConfig, vocab: int, tp: int, stage: Stage | None = None) -> int:
    """Elements that each tensor-parallel rank of a stage holds, with its share of the vocabulary's padding."""
    return sum(p.local(model, tp) for p in parameter_list(model, vocab, stage))


def layer_flops(model: ModelConfig, seq: int) -> int:
    """FLOPs of one token's forward pass through one layer, matrix products alone, a multiplication and an addition being 2.

    With h hidden, a heads and g groups of width d, f the MLP's width, s the sequence:

        2 h (a + 2g) d    queries, keys, values
        2 s a d           scores, and as much again for the weighted sum of the values
        2 a d h           output projection
        2 h f  x 2        up and down; x 3 with the gate of SwiGLU

    With a d = h and f = 4 h this is 24 h^2 + 4 s h, the formula of arXiv 2104.04473. Attention counts whole rows, as the
    field does, although causality needs only half of them.
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
    """FLOPs of one token's logits."""
    return 2 * model.size("hidden_size") * vocab


def forward_flops_per_token(model: ModelConfig, vocab: int, seq: int) -> int:
    """FLOPs of one token's forward pass: every layer and the logits."""
    return model.size("num_layers") * layer_flops(model, seq) + head_flops(model, vocab)


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one token in a stage: forward; backward to the stage's input; backward to its weights."""

    forward: int
    backward: int
    weight: int


def stage_flops(model: ModelConfig, vocab: int, seq: int, stage: Stage) -> StageFlops:
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


def flops_per_iteration(model: ModelConfig, vocab: int, seq: int, global_batch: int) -> int:
    """FLOPs of one step over all ranks."""
    return flops_per_token(model, vocab, seq) * seq * global_batch


def buffer_elements(model: ModelConfig, own: Iterable[ParameterSize], tp: int) -> int:
    """Elements of the flat buffers that hold the parameters `own` on one rank."""
    return sum(-(-p.local(model, tp) // ALIGN) * ALIGN for p in own)


def weight_bytes(bf16: bool) -> int:
    """Bytes for each weight: as the model computes with it, and its fp32 main weight where that is bf16."""
    return 2 + 4 if bf16 else 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. activations is an estimate; the others are exact for `optim/buffers.py`."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_per_rank(
    model: ModelConfig,
    vocab: int,
    *,
    tp: int,
    seq: int,
    micro_batch: int,
    bf16: bool,
    sequence_parallel: bool = False,
    optimizer: str = "adam",
    stages: Sequence[Stage] = (),
    in_flight: Sequence[int] = (),
) -> Memory:
    """What one rank holds at its fullest, which owns `stages`; by default one that is the whole model.

    in_flight: for each stage the micro-batches that wait for their backward pass; by default one. A word embedding that
    several stages of the rank use is one tensor.
    """
    stages = stages or [Slice(range(model.size("num_layers")))]
    own = {p.name: p for stage in stages for p in parameter_list(model, vocab, stage)}
    held = buffer_elements(model, own.values(), tp)
    activations = (
        activation_bytes(model, vocab, tp, seq, micro_batch, bf16, sequence_parallel, stage, waiting)
        for stage, waiting in zip(stages, in_flight or [1] * len(stages), strict=True)
    )
    return Memory(
        weights=held * weight_bytes(bf16),
        gradients=held * 4,
        optimizer=held * (8 if optimizer == "adam" else 4),
        activations=sum(activations),
    )


def activation_bytes(
    model: ModelConfig,
    vocab: int,
    tp: int,
    seq: int,
    micro_batch: int,
    bf16: bool,
    sequence_parallel: bool,
    stage: Stage | None = None,
    in_flight: int = 1,
) -> int:
    """Activations that the backward pass needs, by the count of arXiv 2205.05198, section 4, without recomputation.

    For 16 bit, a d = h, f = 4 h and attention weights kept, a layer has s b h (10 + 24/t + 5 a s / (h t)) bytes, all of
    it over t under sequence parallelism. The a s term falls away where a fused kernel does the attention. The output
    layer and the loss are counted at their fullest for the one micro-batch that they are at, `head_loss_bytes`; every
    other one in flight waits with the gradient of its final hidden states, which the loss has made already.
    """
    hidden, ffn, kv = model.size("hidden_size"), model.size("ffn_hidden_size"), model.size("kv_channels")
    heads, groups = model.size("num_attention_heads"), model.size("num_query_groups")
    stage = stage or Slice(range(model.size("num_layers")))
    element = 2 if bf16 else 4
    shared = tp if sequence_parallel else 1  # what norms and dropout hold is cut only then
    mask = 1 if model.hidden_dropout > 0 else 0
    between = (4 * element + 2 * mask) * hidden / shared  # inputs of two norms and of two linear layers, two masks
    inside = element * ((2 * heads + 2 * groups) * kv + ffn * (3 if model.activation == "swiglu" else 2)) / tp
    if model.attention_dropout > 0 and not model.fused_attention_dropout:
        inside += (2 * element + 1) * heads * seq / tp  # softmax, its mask, what is left
    layers = len(stage.layers) * (between + inside) * in_flight
    ends = 0.0
    if stage.embedding:
        ends += mask * hidden / shared * in_flight
    loss = 0
    if stage.head and in_flight:
        ends += element * hidden / shared * (2 * in_flight - 1)  # input of the final norm, gradient of its output
        loss = head_loss_bytes(seq * micro_batch, hidden, padded_vocabulary(model, vocab, tp) // tp, bf16)
    return int(seq * micro_batch * (layers + ends)) + loss


def head_loss_bytes(tokens: int, hidden: int, held: int, bf16: bool) -> int:
    """What output layer and loss hold at their fullest, with `held` rows of the vocabulary on each rank.

    They never hold the logits of all tokens, but make gradients chunk by chunk. So there are the input and its gradient,
    tokens x hidden each; the weight's gradient, held x hidden in fp32, and a product or a copy of it in the compute dtype;
    and of one chunk the logits, in bf16 also their fp32 copy, and the fp32 probabilities.
    """
    element = 2 if bf16 else 4
    rows = min(tokens, max(FEWEST_ROWS, CHUNK // held))
    chunk = rows * held * (element + (4 if bf16 else 0) + 4)
    return 2 * element * tokens * hidden + (4 + element) * held * hidden + chunk
