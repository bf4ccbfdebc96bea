"""Rules by which the next token of a text is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_FINITE = "the model's logits are not finite: its weights are damaged, or its training diverged"


@dataclass(frozen=True)
class Sampling:
    """Rule by which the next token is chosen.

    Attributes:
        temperature: divisor of the logits; 0 chooses the most probable token.
        top_k: sample only from the k most probable tokens; 0 for all.
        top_p: sample only from the most probable tokens that together reach this probability (nucleus sampling, arXiv
            1904.09751); 0 and 1 for all.
        top_p_decay: factor of top_p after each token; 0 for none.
        top_p_bound: lower bound of the decaying top_p.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    top_p_decay: float = 0.0
    top_p_bound: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"--temperature {self.temperature} is no temperature; legal: 0 (greedy) and above, finite")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} is negative; legal: 0 (all) and above")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"--top-p {self.top_p} is no probability; legal: 0 to 1")

    def choose(self, logits: Tensor, generator: torch.Generator, written: int = 0, banned: Sequence[int] = ()) -> int:
        """Choose the next token, on the CPU so that a seed gives the same text on every device.

        Args:
            logits: `[vocab]`. Of equal logits, the lower token id counts as the more probable.
            generator: the random generator of the text, on the CPU.
            written: number of tokens generated so far.
            banned: tokens that must not be chosen.

        Raises:
            ValueError: a logit is not finite.
        """
        logits = mask_banned(logits, banned)
        if self.temperature == 0.0:
            return int(logits.argmax())
        # In fp64, dividing by a temperature of any size gives zero or minus infinity, never NaN.
        ordered, order = logits.sort(descending=True, stable=True)  # [vocab]
        kept = ordered[: self.top_k or None].double()  # [k], as are the probabilities
        probabilities = ((kept - kept[0]) / self.temperature).softmax(dim=-1)
        top_p = self.top_p
        if self.top_p_decay > 0.0:
            top_p = max(top_p * self.top_p_decay**written, self.top_p_bound)
        if 0.0 < self.top_p < 1.0 or self.top_p_decay > 0.0:
            # The sum of the tokens before each one, so that the token that crosses top_p is kept, and always the first one.
            before = probabilities.cumsum(0) - probabilities  # [k]
            probabilities = probabilities.masked_fill((before >= top_p).logical_and_(before > 0.0), 0.0)
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def mask_banned(logits: Tensor, banned: Sequence[int] = ()) -> Tensor:
    """Return logits `[vocab]` on the CPU, with minus infinity for `banned` tokens; ValueError if one is not finite."""
    logits = logits.cpu()
    if not bool(logits.isfinite().all()):
        raise ValueError(NOT_FINITE)
    return logits.index_fill(-1, torch.tensor(banned, dtype=torch.int64), -torch.inf) if banned else logits
