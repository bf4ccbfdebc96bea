"""The embedding of a model: token ids to hidden states, from words, learned positions and token types."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.config.schema import ModelConfig
from megatron.model.block import HiddenDropout
from megatron.parallel.embedding import VocabEmbedding, VocabShard
from megatron.parallel.random import DropoutKeys
from megatron.parallel.tensor_parallel import TensorParallel


class Embedding(nn.Module):
    """Embedding, `[batch, seq] -> [seq, batch, hidden]`: word, learned position and token type, then dropout."""

    def __init__(self, config: ModelConfig, vocabulary: VocabShard, tp: TensorParallel, *, seed: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.local_positions = tp.positions
        self.dropout = HiddenDropout(seed, -1, "embedding", config.hidden_dropout)
        self.word = VocabEmbedding(vocabulary, hidden, tp)
        self.position: nn.Module | None = None
        if config.position_embedding_type == "learned_absolute":
            self.position = nn.Module()
            self.position.weight = tp.parameter(config.max_position_embeddings, hidden, init="normal")
        self.segment: nn.Module | None = None
        if config.num_token_types:
            self.segment = nn.Module()
            self.segment.weight = tp.parameter(config.num_token_types, hidden, init="normal")

    def forward(self, tokens: Tensor, positions: Tensor, segments: Tensor | None, keys: DropoutKeys | None) -> Tensor:
        """Add the embeddings of each token, and apply dropout.

        Args:
            tokens: int64 `[batch, seq]`, whole sequences.
            positions: int64 `[batch, seq]`, positions within the documents.
            segments: int64 `[batch, seq]`, token types; None if the model has none.
            keys: the random keys of the tokens; None outside training.

        Returns:
            Hidden states `[seq, batch, hidden]`; under sequence parallelism, this rank's slice of the sequence.
        """
        x: Tensor = self.word(tokens.t())  # [seq, batch, hidden]
        local = self.local_positions(tokens.shape[1])  # this rank's slice of the sequence
        for table, indices in ((self.position, positions), (self.segment, segments)):
            if table is not None and indices is not None:
                x = x + nn.functional.embedding(indices.t()[local], table.get_parameter("weight"))  # [seq, batch, hidden]
        dropped: Tensor = self.dropout(x, keys)  # [seq, batch, hidden]
        return dropped
