"""Bytes of activations, counted by hand."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema import MemoryConfig, ModelConfig
from megatron.contract import StagePart
from megatron.parallel.embedding import padded_vocabulary

# Of the chunks in which `parallel/cross_entropy.py` works through the logits, on a GPU; a CPU's are no larger.
CHUNK = 1 << 27  # logits
FEWEST_ROWS = 256  # tokens, however many logits they have


@dataclass(frozen=True)
class Activations:
    """Bytes of a stage's activations. kept: from forward to backward pass. passing: while one action runs, at most."""

    kept: int
    passing: int


def activations_of(
    model: ModelConfig,
    vocab: int,
    tp: int,
    seq: int,
    micro_batch: int,
    bf16: bool,
    sequence_parallel: bool,
    stage: StagePart | None = None,
    in_flight: int = 1,
    memory: MemoryConfig | None = None,
    cp: int = 1,
    split: int = 0,
) -> Activations:
    """Activations that the backward pass needs, by the count of arXiv 2205.05198, sections 4 and 5.

    Layers keep `layer_activations`. What is run again keeps its input, and passes by once while its gradients are made.
    So does the output layer with the loss, `head_loss_bytes`; of it a micro-batch in flight keeps the final norm's input and,
    once it is made, the gradient of the final hidden states. cp: each rank has 1 / cp of the tokens; what attention around
    the ring takes for a while, `ring_bytes`, passes by with the layer. split: how many of the micro-batches in flight are
    between the parts of a split backward pass, and have the factors of their weights' gradients, however little they kept.
    """
    stage, memory, element = stage or StagePart(range(model.size("num_layers"))), memory or MemoryConfig(), 2 if bf16 else 4
    shared = tp if sequence_parallel else 1
    each = layer_activations(model, tp, seq, bf16, sequence_parallel, cp)
    kept, again = _recomputed(each, len(stage.layers), tp, memory)
    if memory.distribute_saved_activations and not stage.embedding:  # the executor holds what came from another rank
        kept += each.input
    if stage.embedding and model.hidden_dropout > 0:
        kept += model.size("hidden_size") / shared  # the dropout's mask
    kept = kept * (in_flight - split) + max(kept, len(stage.layers) * _weight_factors(model, tp, element)) * split
    loss, tokens = 0, seq // cp * micro_batch
    if stage.head and in_flight:
        hidden = model.size("hidden_size")
        kept += element * hidden / shared * (2 * in_flight - 1)
        held = padded_vocabulary(vocab, tp, model.make_vocab_size_divisible_by) // tp
        loss = head_loss_bytes(tokens, hidden, held, bf16) if model.predicts_words else 0
    layer = int(tokens * again) + (ring_bytes(model, tp, seq, micro_batch, bf16, cp) if stage.layers else 0)
    return Activations(int(tokens * kept), max(loss, layer) if in_flight else 0)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes for each token. all: what a layer keeps; of it core: within the core attention; input: the layer's input."""

    all: float
    core: float
    input: float


def layer_activations(
    model: ModelConfig, tp: int, seq: int, bf16: bool, sequence_parallel: bool, cp: int = 1
) -> LayerActivations:
    """What one layer keeps on each rank where nothing is run again.

    For 16 bit, a d = h, f = 4 h and attention weights kept, it has s b h (10 + 24/t + 5 a s / (h t)) bytes, all of it over t
    under sequence parallelism: equations 2 and 4 of arXiv 2205.05198. The a s term falls away where a fused kernel does the
    attention. Beyond the paper: with the gate of SwiGLU the MLP keeps four tensors instead of two, and the core attention
    repeats keys and values of grouped queries. Around the ring of context parallelism it keeps one fp32 number for each query
    and head, and nothing that grows with s. Left out: a few numbers for each token or head, and RMSNorm without a kernel.
    """
    hidden, ffn, kv = model.size("hidden_size"), model.size("ffn_hidden_size"), model.size("kv_channels")
    heads, groups = model.size("num_attention_heads"), model.size("num_query_groups")
    element = 2 if bf16 else 4
    shared = tp if sequence_parallel else 1  # what norms and dropout hold is cut only then
    mask = 1 if model.hidden_dropout > 0 else 0
    between = (4 * element + 2 * mask) * hidden / shared  # inputs of two norms and of two linear layers, two masks
    # Queries, keys, values and what they make; what the activation takes and what it gives.
    inside = element * ((2 * heads + 2 * groups) * kv + ffn * (4 if model.activation == "swiglu" else 2)) / tp
    core = element * 2 * (heads - groups) * kv / tp
    if model.attention_dropout > 0 and not model.fused_attention_dropout:
        core += (2 * element + 1) * heads * seq / tp  # softmax, its mask, what is left
    if cp > 1:
        core = 4 * heads / tp
    return LayerActivations(between + inside + core, core, element * hidden / shared)


def _weight_factors(model: ModelConfig, tp: int, element: int) -> float:
    """Bytes for each token: inputs of a layer's linear layers, whole in the sequence, and gradients of their outputs."""
    heads, groups = model.size("num_attention_heads"), model.size("num_query_groups")
    ffn = model.size("ffn_hidden_size") * (3 if model.activation == "swiglu" else 2)
    return element * (4 * model.size("hidden_size") + (2 * (heads + groups) * model.size("kv_channels") + ffn) / tp)


def _recomputed(each: LayerActivations, layers: int, tp: int, memory: MemoryConfig) -> tuple[float, float]:
    """Bytes for each token that a stage's layers keep, and those that one piece takes while it is run again."""
    if memory.recompute_granularity is None or not layers:
        return layers * each.all, 0.0
    if memory.recompute_granularity == "selective":
        return layers * (each.all - each.core), each.core
    count = min(memory.recompute_num_layers, layers)
    # A chunk's layers keep their inputs too: its own is there already, unless each rank has a share of it.
    share, there = (each.input / tp, 0.0) if memory.distribute_saved_activations else (each.input, each.input)
    if memory.recompute_method == "uniform":
        return -(-layers // count) * share, count * each.all - there
    return count * share + (layers - count) * each.all, each.all - there


def ring_bytes(model: ModelConfig, tp: int, seq: int, micro_batch: int, bf16: bool, cp: int) -> int:
    """What `parallel/ring.py` holds at its fullest beside what a layer keeps: in its backward pass, an estimate.

    Blocks of scores, `[micro_batch, heads / tp, chunk, chunk]` in fp32 with a chunk of seq / 2 cp: three, with dropout six.
    Of keys and values those at hand and those that arrive, and in fp32 three gradients: made here, leaving and arriving. Of
    the queries copies of three tensors in the compute dtype, and in fp32 two of their gradients.
    """
    if cp == 1:
        return 0
    heads, groups, kv = model.size("num_attention_heads"), model.size("num_query_groups"), model.size("kv_channels")
    element, local = 2 if bf16 else 4, seq // cp
    blocks = (6 if model.attention_dropout > 0 else 3) * 4 * heads * (local // 2) ** 2
    travelling = 2 * groups * kv * local * (2 * element + 3 * 4)
    queries = heads * kv * local * (3 * element + 2 * 4)
    return micro_batch * (blocks + travelling + queries) // tp


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
