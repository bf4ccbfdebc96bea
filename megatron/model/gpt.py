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
from megatron.mesh.mesh import Axis
from megatron.model.attention import Attend, Cache, Masks, causal_attention
from megatron.model.block import Block, HiddenDropout
from megatron.model.norm import Norm
from megatron.model.rotary import Rotary
from megatron.parallel.collectives import copy_to, gather_from, gather_sum
from megatron.parallel.cross_entropy import head_loss, label_scores
from megatron.parallel.embedding import VocabEmbedding, VocabShard, vocab_parameter
from megatron.parallel.linear import column_products, replicated
from megatron.parallel.random import DropoutKeys
from megatron.parallel.recompute import Recompute
from megatron.parallel.spec import describe, name_parameters, spec_of

MOST_LOGITS = 1 << 24  # that are in memory at once for log-probabilities: 64 MiB


class Embedding(nn.Module):
    """Token ids `[batch, seq]` -> `[seq, batch, hidden]`: word, learned position and kind of segment, then dropout."""

    def __init__(self, config: ModelConfig, shard: VocabShard, tp: Axis, *, sequence_parallel: bool, seed: int) -> None:
        super().__init__()
        hidden = config.size("hidden_size")
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.dropout = HiddenDropout(seed, -1, "embedding", config.hidden_dropout)
        self.word = VocabEmbedding(shard, hidden, tp, sequence_parallel=sequence_parallel)
        self.position: nn.Module | None = None
        if config.position_embedding_type == "learned_absolute":
            self.position = nn.Module()
            shape = (config.size("max_position_embeddings"), hidden)
            spec = replicated(shape, sequence_parallel, decay=True, init="normal")
            self.position.weight = describe(nn.Parameter(torch.empty(shape)), spec)
        self.segment: nn.Module | None = None
        if config.segment_kinds:
            self.segment = nn.Module()
            shape = (config.segment_kinds, hidden)
            spec = replicated(shape, sequence_parallel, decay=True, init="normal")
            self.segment.weight = describe(nn.Parameter(torch.empty(shape)), spec)

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor | None, keys: DropoutKeys | None) -> Tensor:
        x: Tensor = self.word(tokens.t())
        for table, numbers in ((self.position, positions), (self.segment, segments)):
            if table is None or numbers is None:
                continue
            seen = numbers.t()
            if self.sequence_parallel:  # each rank adds what belongs to its own slice
                seen = seen[local_columns(seen.shape[0], self.tp)]
            x = x + nn.functional.embedding(seen, table.get_parameter("weight"))
        dropped: Tensor = self.dropout(x, keys)
        return dropped


class GPT(nn.Module):
    """The part of a GPT that `part` names. Parameters have global names, and are uninitialised until `initialize`.

    tp: the tensor-parallel axis. seed: of the dropout masks. attend: the core attention, plain unless given. recompute: what
    is run again in the backward pass, by default nothing.
    word: the embedding's weight, for a tied output layer on a stage without the embedding when both stages are on the same
    rank; elsewhere such a stage holds a copy. The configuration must be resolved, with vocab_size set.
    """

    def __init__(
        self,
        config: ModelConfig,
        part: StagePart,
        tp: Axis,
        *,
        sequence_parallel: bool = False,
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
        self.sequence_parallel = sequence_parallel = sequence_parallel and tp.size > 1
        self.recompute = recompute or Recompute()
        attend = self.recompute.attention(attend)
        self.shard = VocabShard.of(config.size("vocab_size"), tp, config.make_vocab_size_divisible_by)
        with torch.device(device):
            self.embedding = None
            if part.embedding:
                self.embedding = Embedding(config, self.shard, tp, sequence_parallel=sequence_parallel, seed=seed)
            self.layers = nn.ModuleDict(
                {str(i): Block(config, i, tp, attend, sequence_parallel=sequence_parallel, seed=seed) for i in part.layers}
            )
            self.final_norm = Norm(config, sequence_parallel=sequence_parallel) if part.head else None
            self.head: nn.Module | None = None
            if part.head and config.predicts_words and not (config.tied and (part.embedding or word is not None)):
                self.head = nn.Module()
                self.head.weight = vocab_parameter(self.shard, config.size("hidden_size"))
        self.to(dtype)
        if config.tied and part.embedding != part.head:
            self._describe_copy()
        name_parameters(self)
        self._word = (word,)  # in a tuple, so that it stays the other stage's parameter

    def _describe_copy(self) -> None:
        """First and last stage each hold the tied matrix: one parameter, whose gradients are summed over both."""
        holder = self.embedding.word if self.embedding is not None else self.head
        if holder is not None:
            weight = holder.get_parameter("weight")
            spec = replace(spec_of(weight), name="embedding.word.weight", sum_grad_over=frozenset({"embedding"}))
            describe(weight, spec)

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor | Loss:
        """Hidden states in (None on the first stage); hidden states out, or the loss where the head is."""
        x = self.hidden(x, batch)
        return self.loss(x, batch) if self.part.head else x

    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """The loss of the final hidden states."""
        labels, mask = batch.labels.t().reshape(-1), batch.loss_mask.t().reshape(-1)
        x = gather_sum(x, self.tp, 0) if self.sequence_parallel else copy_to(x, self.tp)
        return Loss(head_loss(x.flatten(0, 1), self._output_weight(), labels, mask, self.shard, self.tp), mask.sum())

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
        return seq // self.tp.size if self.sequence_parallel else seq, rows, self.config.size("hidden_size")

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
        columns = column_products(x, self.tp, self.sequence_parallel, [self._output_weight()], [None])[0]
        return gather_from(columns, self.tp, -1)[..., : self.shard.vocab].float()

    def scores(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of final hidden states, the labels' log-probabilities fp32 `[seq, batch]`, and bool: is it the most probable token?

        Equal on every tensor-parallel rank; only a few tokens' logits are there at a time.
        """
        x = gather_from(x, self.tp, 0) if self.sequence_parallel else x
        labels = batch.labels.t()
        scores, hits = label_scores(x.flatten(0, 1), self._output_weight(), labels.reshape(-1), self.shard, self.tp)
        return scores.view(labels.shape), hits.view(labels.shape)

    def _output_weight(self) -> nn.Parameter:
        """`[held, hidden]`: this rank's rows of the output layer."""
        if self.head is not None:
            return self.head.get_parameter("weight")
        word = self.embedding.word.weight if self.embedding is not None else self._word[0]
        if word is None:
            raise ValueError("this stage has no output layer")
        return word

    def _random(self, batch: Batch) -> DropoutKeys | None:
        """The tokens' random identities; None where nothing is dropped."""
        if not self.training or max(self.config.hidden_dropout, self.config.attention_dropout) == 0.0:
            return None
        seq = batch.tokens.shape[1]
        local = local_columns(seq, self.tp) if self.sequence_parallel else slice(0, seq)
        places = torch.arange(seq, device=batch.tokens.device) if batch.places is None else batch.places
        return DropoutKeys.of(self.seed, batch.samples, places, local)

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


def local_columns(seq: int, tp: Axis) -> slice:
    """The positions that a rank holds under sequence parallelism."""
    share = seq // tp.size
    return slice(tp.rank * share, (tp.rank + 1) * share)


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
