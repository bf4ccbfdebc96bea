"""Predictions: logits of the token after sequences, and log-probabilities of their own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOGITS = 1 << 24  # that are in memory at once for log-probabilities: 64 MiB


@dataclass(frozen=True)
class Prediction:
    """The answer of a whole model to some sequences of equal length.

    Attributes:
        logits: fp32 `[batch, vocab]`, of the token after the last one.
        log_probs: fp32 `[seq - 1, batch, 1 + top]`, for each token after the first given those before it: its own, then those
            of the `top` most probable ones. `[0, batch, 1]` where nobody asked.
        ids: int64, of the same shape: the tokens they belong to.
    """

    logits: Tensor
    log_probs: Tensor
    ids: Tensor


def predict(output: Callable[[Tensor], Tensor], x: Tensor, tokens: Tensor, vocab: int, top: int | None = None) -> Prediction:
    """Return the prediction from the final hidden states, a piece at a time: a vocabulary is wide.

    Args:
        output: hidden states -> logits, fp32 `[seq, batch, vocab]`.
        x: final hidden states of whole sequences, `[seq, batch, hidden]`.
        tokens: int64 `[batch, seq]`, whose they are.
        vocab: tokens of the vocabulary.
        top: also say how probable `tokens` are, and this many of the most probable ones at each place; None: do not.
    """
    batch, seq = tokens.shape
    found = empty_prediction(seq, batch, vocab, top, x.device)
    found.logits.copy_(output(x[-1:])[0])  # [batch, vocab]
    positions = found.log_probs.shape[0]
    piece = max(1, MAX_LOGITS // found.logits.numel())
    for start in range(0, positions, piece):
        here = slice(start, min(start + piece, positions))
        following = tokens.t()[here.start + 1 : here.stop + 1]  # [piece, batch]: the token after each position
        found.log_probs[here], found.ids[here] = log_probabilities(output(x[here]), following, top or 0)
    return found


def log_probabilities(logits: Tensor, following: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens and of the most probable ones, fp32 and int64 `[..., 1 + top]`; see `Prediction`.

    Args:
        logits: fp32 `[..., vocab]`.
        following: int64 `[...]`, the tokens that came.
        top: most probable tokens at each place.
    """
    log_probs, own = logits.log_softmax(dim=-1), following.unsqueeze(-1)  # [..., vocab], [..., 1]
    best, ids = log_probs.topk(top, dim=-1)  # [..., top]
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
