"""The transformer: embedding, layers and final norm, or those of them that belong to one pipeline stage.

The models in `gpt.py`, `bert.py` and `task_heads.py` add an output layer or other heads. The default is GPT-2's architecture
(pre-norm, GELU, learned positions). RMSNorm, SwiGLU, rotary positions, grouped queries and no biases are options; together they
make the Llama family's architecture. Hidden states are `[seq, batch, hidden]`; under sequence parallelism, `seq` is this rank's
slice of the sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.contract import Batch, Loss, StagePart
from megatron.model.attention import (
    AttentionCache,
    AttentionContext,
    CoreAttention,
    attention_mask,
    bidirectional_attention,
    causal_attention,
)
from megatron.model.block import Block
from megatron.model.embedding import Embedding
from megatron.model.norm import make_norm
from megatron.model.rotary import Rotary
from megatron.parallel.embedding import VocabShard, describe_copy
from megatron.parallel.output import VocabOutput
from megatron.parallel.random import DropoutKeys
from megatron.parallel.recompute import Recompute
from megatron.parallel.spec import name_parameters
from megatron.parallel.tensor_parallel import TensorParallel


class Transformer(nn.Module):
    """The part of a model that `part` describes. Parameters have global names, and are uninitialised until `initialize`.

    A subclass sets `causal`, the kind of its attention, and implements `build_heads` and `loss`.
    """

    causal: bool

    def __init__(
        self,
        config: ModelConfig,
        part: StagePart,
        tp: TensorParallel,
        *,
        seed: int = 0,
        core_attention: CoreAttention | None = None,
        recompute: Recompute | None = None,
        word: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Build the part.

        Args:
            config: a resolved configuration with vocab_size set.
            part: the layers of this part, and whether it has the embedding and the heads.
            tp: the tensor-parallel ranks.
            seed: seed of the dropout masks.
            core_attention: the core attention; by default for whole sequences on one rank, causal if the model is.
            recompute: the activations to recompute in the backward pass; by default none.
            word: the embedding's weight, for a tied output layer on a stage without the embedding, if both stages are in the
                same process; otherwise such a stage has a copy.
            dtype: dtype of the parameters.
            device: device of the parameters.
        """
        super().__init__()
        self.config, self.part, self.tp, self.seed = config, part, tp, seed
        self.dtype, self.device = dtype, torch.device(device)
        self.recompute = recompute or Recompute()
        plain = causal_attention if self.causal else bidirectional_attention
        core_attention = self.recompute.attention(core_attention or plain)
        self.vocabulary = VocabShard.for_rank(config.known_vocab_size, tp.axis, config.make_vocab_size_divisible_by)
        with torch.device(device):
            self.embedding: Embedding | None = None
            if part.embedding:
                self.embedding = Embedding(config, self.vocabulary, tp, seed=seed)
                if config.ties_embeddings and not part.head:
                    describe_copy(self.embedding.word.weight)
            self.layers = nn.ModuleDict({str(i): self.build_layer(i, core_attention) for i in part.layers})
            self.final_norm = make_norm(config, tp) if part.head else None
            self.build_heads(word if self.embedding is None else self.embedding.word.weight)
        self.to(dtype)
        name_parameters(self)

    @staticmethod
    def layer_kind(config: ModelConfig, number: int) -> Hashable:
        """Return a key that is equal for layers with equal parameters and equal work. Here all layers are equal: None."""
        return None

    def build_layer(self, number: int, core_attention: CoreAttention) -> Block:
        """Return the layer with global number `number`."""
        return Block(self.config, number, self.tp, core_attention, seed=self.seed)

    @abstractmethod
    def build_heads(self, word: nn.Parameter | None) -> None:
        """Add the modules that read the final hidden states if `part.head`; set each to None otherwise.

        Args:
            word: the embedding's weight `[vocab, hidden]`, if this process holds it.
        """

    @abstractmethod
    def loss(self, x: Tensor, batch: Batch) -> Loss:
        """Return the loss of the final hidden states `[seq, batch, hidden]`."""

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor | Loss:
        """Return the hidden states `[seq, batch, hidden]` after this part, or the loss on the part with the head.

        Args:
            x: hidden states `[seq, batch, hidden]` of the stage before; None on the part with the embedding.
            batch: the micro-batch.
        """
        x = self.hidden(x, batch)
        return self.loss(x, batch) if self.part.head else x

    def hidden(self, x: Tensor | None, batch: Batch, cache: AttentionCache | None = None) -> Tensor:
        """Run the embedding, layers and final norm of this part.

        Args:
            x: hidden states `[seq, batch, hidden]` of the stage before; None on the part with the embedding.
            batch: the micro-batch; with a cache only the new tokens, at their true positions.
            cache: keys and values of the earlier tokens.

        Returns:
            Hidden states `[seq, batch, hidden]`, normalised on the part with the head.
        """
        config, keys = self.config, self._dropout_keys(batch)
        if self.embedding is not None:
            x = self.embedding(batch.tokens, batch.positions, batch.segments, keys)  # [seq, batch, hidden]
        if x is None:
            raise ValueError("a stage without the embedding needs hidden states")
        rotary = None
        if config.position_embedding_type == "rope":
            head_dim, interleaved = config.kv_channels, config.rotary_interleaved
            rotary = Rotary.from_positions(
                batch.positions, head_dim, config.rotary_percent, config.rotary_base, interleaved
            )  # cosines and sines [seq, batch, 1, rotary_dim]
        mask = attention_mask(batch, causal=self.causal)  # [batch, 1, seq, seq], or None
        dropout, fused = config.attention_dropout, config.fused_attention_dropout
        context = AttentionContext(mask, dropout, keys, fused, batch.documents)
        blocks = list(self.layers.values())
        # [seq, batch, hidden]
        x = self.recompute.run_layers(blocks, lambda block, x: block(x, context, keys, rotary, cache), x)
        return x if self.final_norm is None else self.final_norm(x)  # [seq, batch, hidden]

    def hidden_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Return the shape of this rank's hidden states between stages."""
        rows, seq = batch.tokens.shape
        # Sequence first; under sequence parallelism, this rank's slice.
        return len(range(seq)[self.tp.positions(seq)]), rows, self.config.hidden_size

    def build_output(self, word: nn.Parameter | None) -> VocabOutput | None:
        """Return the output layer, or None on a part without it. Tied to the embedding, it has no matrix of its own."""
        config, part = self.config, self.part
        if not (part.head and config.has_output_layer):
            return None
        output = VocabOutput(self.vocabulary, config.hidden_size, self.tp, tied=word if config.ties_embeddings else None)
        if config.ties_embeddings and output.weight is not None:
            describe_copy(output.weight)
        return output

    def _dropout_keys(self, batch: Batch) -> DropoutKeys | None:
        """Return the random keys of the tokens; None without dropout."""
        if not self.training or max(self.config.hidden_dropout, self.config.attention_dropout) == 0.0:
            return None
        seq = batch.tokens.shape[1]
        places = torch.arange(seq, device=batch.tokens.device) if batch.places is None else batch.places  # [seq]
        return DropoutKeys.from_samples(self.seed, batch.samples, places, self.tp.positions(seq))
