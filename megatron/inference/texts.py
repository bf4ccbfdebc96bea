"""Texts that a model writes: a prompt, what follows it so far, and what it takes to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron.config.schema import ModelConfig
from megatron.inference.kv_cache import NewTokens
from megatron.inference.prediction import Prediction


class Predictor(Protocol):
    """A whole model: an `inference.pipeline.Pipeline`, in one process or over several ranks."""

    config: ModelConfig
    device: torch.device

    def eval(self) -> object: ...

    def predict(self, pieces: Sequence[NewTokens], top: int = 0) -> Prediction:
        """Compute new tokens of any number of texts in one pass, and predict the tokens after them.

        Args:
            pieces: the new tokens; their caches get the keys and values.
            top: most probable tokens to tell at each place that is scored.
        """
        ...


def free_positions(model: Predictor, prompt: Sequence[int]) -> int | None:
    """Return how many tokens can follow `prompt`: the free learned positions, or None for other position embeddings."""
    if model.config.position_embedding_type != "learned_absolute":
        return None
    return model.config.max_position_embeddings - len(prompt)


def check_prompt(model: Predictor, prompt: Sequence[int], *, reads_only: bool = False) -> None:
    """Check that a prompt can be continued.

    Args:
        model: the model.
        prompt: the tokens of the prompt.
        reads_only: no token will be generated, so no position need be free.

    Raises:
        ValueError: the prompt is empty, has unknown tokens, or leaves no position free.
    """
    room = free_positions(model, prompt)
    if not prompt:
        raise ValueError("the prompt becomes no tokens: generation needs at least one to go on from")
    if room is not None and room < (0 if reads_only else 1):
        last = len(prompt) + room
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model {last} positions: shorten the prompt")
    vocabulary = model.config.known_vocab_size
    if outside := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"token {outside[0]} of the prompt is outside of the vocabulary of {vocabulary}")


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a token given those before it; ids and log-probabilities of the most probable tokens, best first."""

    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class GeneratedText:
    """A prompt, and the tokens generated after it so far.

    Attributes:
        tokens: the tokens of the prompt and the generated ones.
        start: index of the first generated token.
        scores: scores of tokens[1:], if they were requested.
        end: "" until the text has ended; "stop" if its last token ended it; "length" if it has the maximum number of tokens.
    """

    tokens: list[int]
    start: int
    scores: list[TokenScore] = field(default_factory=list)
    end: str = ""

    @classmethod
    def from_prompt(cls, prompt: Sequence[int]) -> GeneratedText:
        """Return the text of a prompt without generated tokens."""
        return cls(list(prompt), len(prompt))

    @property
    def written(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - self.start
