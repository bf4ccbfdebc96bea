"""Predictions: logits of the tokens after texts, and log-probabilities of their own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.inference.kv_cache import Pass

MAX_LOGITS = 1 << 24  # that are in memory at once for log-probabilities: 64 MiB


@dataclass(frozen=True)
class Prediction:
    """The answer of a whole model to a pass.

    Attributes:
        logits: fp32 `[texts, vocab]`, of the token after the last one of each text whose piece asks for it.
        log_probs: fp32 `[scored, 1 + top]`, for each token after the first of each text whose piece asks for it: its own
            given those before it, then those of the `top` most probable ones.
        ids: int64, of the same shape: the tokens they belong to.
    """

    logits: Tensor
    log_probs: Tensor
    ids: Tensor


def predict(output: Callable[[Tensor], Tensor], x: Tensor, wanted: Pass, vocab: int, top: int) -> Prediction:
    """Return the prediction from the final hidden states, a piece at a time: a vocabulary is wide.

    Args:
        output: hidden states -> logits, fp32 `[tokens, 1, vocab]`.
        x: final hidden states of the pass, `[tokens, 1, hidden]`.
        wanted: the pass.
        vocab: tokens of the vocabulary.
        top: most probable tokens to tell at each place that is scored.
    """
    found = empty_prediction(wanted, vocab, top, x.device)
    if wanted.last:
        logits = output(x if len(wanted.last) == len(x) else x[wanted.last])[:, 0]  # [texts, vocab]
        found = replace(found, logits=logits.contiguous())  # without the padding between its rows, as it is broadcast
    if not wanted.scored:
        return found
    places = torch.tensor(wanted.scored, dtype=torch.int64, device=x.device)  # [scored]
    following = wanted.batch.tokens[0][places + 1]  # [scored]
    piece = max(1, MAX_LOGITS // vocab)
    for start in range(0, len(places), piece):
        here = slice(start, start + piece)
        logits = output(x[places[here]])[:, 0]  # [piece, vocab]
        found.log_probs[here], found.ids[here] = log_probabilities(logits, following[here], top)
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


def empty_prediction(wanted: Pass, vocab: int, top: int, device: torch.device) -> Prediction:
    """Return a prediction to be filled.

    Args:
        wanted: the pass.
        vocab: tokens of the vocabulary.
        top: most probable tokens to tell at each place that is scored.
        device: of its tensors.
    """
    shape = (len(wanted.scored), 1 + top)
    logits = torch.empty(len(wanted.last), vocab, device=device)  # [texts, vocab]
    return Prediction(logits, torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int64, device=device))
