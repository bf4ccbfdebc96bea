"""Predictions of a model: next-token logits of sequences, and log-probabilities of their own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOGITS = 1 << 24  # maximum number of logits in memory at once for log-probabilities: 64 MiB


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for sequences of equal length.

    Attributes:
        logits: fp32 `[batch, vocab]`, of the token after the last one.
        log_probs: fp32 `[seq - 1, batch, 1 + top]`, for each token after the first, given those before it: its own
            log-probability, then those of the `top` most probable tokens. `[0, batch, 1]` if not requested.
        ids: int64, of the same shape: the tokens of these log-probabilities.
    """

    logits: Tensor
    log_probs: Tensor
    ids: Tensor


def predict(output: Callable[[Tensor], Tensor], x: Tensor, tokens: Tensor, vocab: int, top: int | None = None) -> Prediction:
    """Return the prediction from the final hidden states, processed in chunks, since logits take much memory.

    Args:
        output: maps hidden states to logits, fp32 `[seq, batch, vocab]`.
        x: final hidden states of whole sequences, `[seq, batch, hidden]`.
        tokens: int64 `[batch, seq]`, the tokens of these sequences.
        vocab: size of the vocabulary.
        top: also compute the log-probabilities of `tokens`, and of this many alternatives at each position; None for neither.
    """
    batch, seq = tokens.shape
    found = empty_prediction(seq, batch, vocab, top, x.device)
    found.logits.copy_(output(x[-1:])[0])  # [batch, vocab]
    positions = found.log_probs.shape[0]
    rows = max(1, MAX_LOGITS // found.logits.numel())
    for start in range(0, positions, rows):
        chunk = slice(start, min(start + rows, positions))
        following = tokens.t()[chunk.start + 1 : chunk.stop + 1]  # [rows, batch]: the token after each position
        # Each [rows, batch, 1 + top].
        found.log_probs[chunk], found.ids[chunk] = log_probabilities(output(x[chunk]), following, top or 0)
    return found


def log_probabilities(logits: Tensor, following: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens and of the most probable ones, fp32 and int64 `[..., 1 + top]`; see `Prediction`.

    Args:
        logits: fp32 `[..., vocab]`.
        following: int64 `[...]`, the tokens that follow.
        top: number of most probable tokens at each position.
    """
    log_probs, own = logits.log_softmax(dim=-1), following.unsqueeze(-1)  # [..., vocab], [..., 1]
    best, ids = log_probs.topk(top, dim=-1)  # [..., top]
    return torch.cat([log_probs.gather(-1, own), best], dim=-1), torch.cat([own, ids], dim=-1)  # each [..., 1 + top]


def empty_prediction(seq: int, batch: int, vocab: int, top: int | None, device: torch.device) -> Prediction:
    """Return a prediction with uninitialised tensors.

    Args:
        seq: tokens per sequence.
        batch: number of sequences.
        vocab: size of the vocabulary.
        top: number of most probable tokens at each position; None for no log-probabilities.
        device: device of the tensors.
    """
    shape = (0, batch, 1) if top is None else (seq - 1, batch, 1 + top)
    logits = torch.empty(batch, vocab, device=device)  # [batch, vocab]
    return Prediction(logits, torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int64, device=device))
