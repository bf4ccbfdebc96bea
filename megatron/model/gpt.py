"""GPT: embedding, layers, final norm, output layer; the whole model, or the slice of it that one stage owns.

By default GPT-2's form (pre-norm, GELU, learned positions, tied output layer). RMSNorm, SwiGLU, rotary positions,
grouped queries, no biases and an untied output layer are options; together they are the Llama family's form.
Hidden states are `[seq, batch, hidden]`, under sequence parallelism `[seq / tp, batch, hidden]` between parallel layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.contract import Batch, Loss, Prediction, StagePart
from megatron.model.attention import Attend, Cache, Masks, causal_attention
from megatron.model.block import Block, HiddenDropout
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.embedding import VocabEmbedding, VocabShard
from megatron.parallel.output import VocabOutput
from megatron.parallel.random import DropoutKeys
from megatron.parallel.recompute import Recompute
from megatron.parallel.spec import describe, name_parameters, spec_of
from megatron.parallel.tensor_parallel import TensorParallel

MOST_LOGITS = 1 << 24  # that are in memory at once for log-probabilities: 64 MiB


class Embedding(nn.Module):
    """Token ids `[batch, seq]` -> `[seq, batch, hidden]`: word, learned position and kind of segment, then dropout."""

    def __init__(self, config: ModelConfig, shard: VocabShard, tp: TensorParallel, *, seed: int) -> None:
        super().__init__()
        hidden = config.size("hidden_size")
        self.tp = tp
        self.dropout = HiddenDropout(seed, -1, "embedding", config.hidden_dropout)
        self.word = VocabEmbedding(shard, hidden, tp)
        self.position: nn.Module | None = None
        if config.position_embedding_type == "learned_absolute":
            self.position = nn.Module()
            self.position.weight = tp.parameter(config.size("max_position_embeddings"), hidden, init="normal")
        self.segment: nn.Module | None = None
        if config.segment_kinds:
            self.segment = nn.Module()
            self.segment.weight = tp.parameter(config.segment_kinds, hidden, init="normal")

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor | None, keys: DropoutKeys | None) -> Tensor:
        x: Tensor = self.word(tokens.t())
        own = self.tp.positions(tokens.shape[1])
        for table, numbers in ((self.position, positions), (self.segment, segments)):
            if table is not None and numbers is not None:
                x = x + nn.functional.embedding(numbers.t()[own], table.get_parameter("weight"))
        dropped: Tensor = self.dropout(x, keys)
        return dropped


class GPT(nn.Module):
    """The part of a GPT that `part` names. Parameters have global names, and are uninitialised until `initialize`.

    tp: over which ranks layers are cut. seed: of the dropout masks. attend: the core attention, plain unless given. recompute:
    what is run again in the backward pass, by default nothing.
    word: the embedding's weight, for a tied output layer on a stage without the embedding when both stages are on the same
    rank; elsewhere such a stage holds a copy. The configuration must be resolved, with vocab_size set.
    """

    def __init__(
        self,
        config: ModelConfig,
        part: StagePart,
        tp: TensorParallel,
        *,
        seed: int = 0,
        attend: Attend = causal_attention,
        recompute: Recompute | None = None,
        word: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.part, self.tp, self.seed = config, part, tp, seed
        self.dtype, self.device = dtype, torch.device(device)
        self.recompute = recompute or Recompute()
        attend = self.recompute.attention(attend)
        self.shard = VocabShard.of(config.size("vocab_size"), tp.axis, config.make_vocab_size_divisible_by)
        with torch.device(device):
            self.embedding = None
            if part.embedding:
                self.embedding = Embedding(config, self.shard, tp, seed=seed)
            self.layers = nn.ModuleDict({str(i): Block(config, i, tp, attend, seed=seed) for i in part.layers})
            self.final_norm = Norm(config, tp) if part.head else None
            self.head: VocabOutput | None = None
            if part.head and config.predicts_words:
                word = word if self.embedding is None else self.embedding.word.weight
                tied = word if config.tied else None
                self.head = VocabOutput(self.shard, config.size("hidden_size"), tp, tied=tied)
        self.to(dtype)
        if config.tied and part.embedding != part.head:
            self._describe_copy()
        name_parameters(self)

    def _describe_copy(self) -> None:
        """First and last stage each hold the tied matrix: one parameter, whose gradients are summed over both."""
        holder = self.embedding.word if self.embedding is not None else self.head
        if holder is not None and (weight := holder.weight) is not None:
            spec = replace(spec_of(weight), name="embedding.word.weight", sum_grad_over=frozenset({"embedding"}))
            describe(weight, spec)

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor | Loss:
        """Hidden states in (None on the first stage); hidden states out, or the loss where the head is."""
        x = self.hidden(x, batch)
        return self.loss(x, batch) if self.part.head else x

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """The loss of the final hidden states."""
        return Loss(self._head().loss(x, batch.labels, batch.loss_mask), batch.loss_mask.sum())

    def hidden(self, x: Tensor | None, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Through embedding, layers and final norm, as far as this part has them."""
        keys = self._random(batch)
        if self.embedding is not None:
            x = self.embedding(batch.tokens, batch.positions, batch.segments, keys)
        if x is None:
            raise ValueError("a stage without the embedding needs hidden states")
        config = self.config
        rotary = None
        if config.position_embedding_type == "rope":
            width, interleaved = config.size("kv_channels"), config.rotary_interleaved
            rotary = Rotary.at(batch.positions, width, config.rotary_percent, config.rotary_base, interleaved)
        probability, fused = config.attention_dropout, config.fused_attention_dropout
        masks = Masks(self._allowed(batch), probability, keys, fused, batch.documents)
        blocks = list(self.layers.values())
        x = self.recompute.through(blocks, lambda block, x: block(x, masks, keys, rotary, cache), x)
        return x if self.final_norm is None else self.final_norm(x)

    def hidden_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Of the hidden states between stages, as one rank holds them."""
        rows, seq = batch.tokens.shape
        return len(range(seq)[self.tp.positions(seq)]), rows, self.config.size("hidden_size")

    def logits(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """Whole model, evaluation: fp32 `[seq, batch, vocab]` on every tensor-parallel rank, padding left out.

        With a cache, `batch` holds only the new tokens, at their true positions.
        """
        return self.output(self.hidden(None, batch, cache))

    def predict(self, batch: Batch, cache: Cache | None = None, top: int | None = None) -> Prediction:
        """Whole model, evaluation: what follows `batch`, as `logits` has it; with `top`, how probable its own tokens are."""
        return self.answer(self.hidden(None, batch, cache), batch, top)

    def answer(self, x: Tensor, batch: Batch, top: int | None = None) -> Prediction:
        """The prediction from the final hidden states, whole sequences of them, a piece at a time: a vocabulary is wide."""
        batch_size, seq = batch.tokens.shape
        found = empty_prediction(seq, batch_size, self.shard.vocab, top, x.device)
        found.logits.copy_(self.output(x[-1:])[0])
        positions = found.log_probs.shape[0]
        piece = max(1, MOST_LOGITS // found.logits.numel())
        for start in range(0, positions, piece):
            here = slice(start, min(start + piece, positions))
            following = batch.tokens.t()[here.start + 1 : here.stop + 1]
            found.log_probs[here], found.ids[here] = log_probabilities(self.output(x[here]), following, top or 0)
        return found

    def output(self, x: Tensor) -> Tensor:
        """Final hidden states to logits, fp32 `[seq, batch, vocab]` on every tensor-parallel rank, padding left out."""
        return self._head().logits(x)

    def scores(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of final hidden states, the labels' log-probabilities fp32 `[seq, batch]`, and bool: is it the most probable token?

        Equal on every tensor-parallel rank; only a few tokens' logits are there at a time.
        """
        return self._head().label_scores(x, batch.labels)

    def _head(self) -> VocabOutput:
        if self.head is None:
            raise ValueError("this stage has no output layer")
        return self.head

    def _random(self, batch: Batch) -> DropoutKeys | None:
        """The tokens' random identities; None where nothing is dropped."""
        if not self.training or max(self.config.hidden_dropout, self.config.attention_dropout) == 0.0:
            return None
        seq = batch.tokens.shape[1]
        places = torch.arange(seq, device=batch.tokens.device) if batch.places is None else batch.places
        return DropoutKeys.of(self.seed, batch.samples, places, self.tp.positions(seq))

    def _allowed(self, batch: Batch) -> Tensor | None:
        """Causal within documents, bool `[batch, 1, seq, seq]`; None where plain causality says all.

        None as well for a part of a sequence: its keys are on several ranks, and the core attention knows which.
        """
        if batch.documents is None or batch.places is not None:
            return None
        same = batch.documents.unsqueeze(2) == batch.documents.unsqueeze(1)
        return same.tril().unsqueeze(1)


def log_probabilities(logits: Tensor, following: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """How probable tokens are: log-probabilities fp32 and ids int64, `[..., 1 + top]`, see `Prediction`.

    logits: fp32 `[..., vocab]`. following: int64 `[...]`.
    """
    log_probs, own = logits.log_softmax(dim=-1), following.unsqueeze(-1)
    best, ids = log_probs.topk(top, dim=-1)
    return torch.cat([log_probs.gather(-1, own), best], dim=-1), torch.cat([own, ids], dim=-1)


def empty_prediction(seq: int, batch: int, vocab: int, top: int | None, device: torch.device) -> Prediction:
    """Return a prediction to be filled.

    Args:
        seq: tokens of each sequence.
        batch: sequences.
        vocab: tokens of the vocabulary.
        top: most probable tokens at each place; None when nobody asks for log-probabilities.
        device: of its tensors.
    """
    shape = (0, batch, 1) if top is None else (seq - 1, batch, 1 + top)
    logits = torch.empty(batch, vocab, device=device)  # [batch, vocab]
    return Prediction(logits, torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int64, device=device))
