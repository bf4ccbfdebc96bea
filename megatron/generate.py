"""Text from a trained model, one token at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.contract import Batch
from megatron.model.attention import Cache
from megatron.model.gpt import GPT
from megatron.parallel.random import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most probable token. top_k: only the k most probable ones; 0 is all. top_p: only the most
    probable ones that together reach this probability; 0 and 1 are all (nucleus sampling, arXiv 1904.09751).
    ValueError for values that make no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"--temperature {self.temperature} is negative; legal: 0 (greedy) and above")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} is negative; legal: 0 (all) and above")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"--top-p {self.top_p} is no probability; legal: 0 to 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token from fp32 logits `[vocab]`; on the CPU, so that a seed gives the same text on every device."""
        logits = logits.float().cpu()
        if self.temperature == 0.0:
            return int(logits.argmax())
        logits = logits / self.temperature
        if 0 < self.top_k < logits.numel():
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if 0.0 < self.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            beyond = ordered.cumsum(0) - ordered >= self.top_p  # reached without this token
            probabilities = probabilities.index_fill(0, order[beyond], 0.0)
        return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield new tokens until `max_new_tokens`, the token `stop` (not yielded), or the model's last position.

    prompt: token ids, at least one. use_cache=False computes everything again for each token: the reference for the
    cache. ValueError for an empty prompt, and for one that leaves no position free.
    """
    last = model.config.size("max_position_embeddings")
    bounded = model.config.position_embedding_type == "learned_absolute"
    if not prompt:
        raise ValueError("the prompt is empty: generation needs at least one token")
    if bounded and len(prompt) >= last:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model {last} positions: shorten the prompt")
    if outside := [token for token in prompt if not 0 <= token < model.shard.vocab]:
        raise ValueError(f"token {outside[0]} of the prompt is outside of the vocabulary of {model.shard.vocab}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(derive_seed(seed, "generate"))
    model.eval()
    tokens, cache = list(prompt), Cache() if use_cache else None
    room = min(max_new_tokens, last - len(prompt)) if bounded else max_new_tokens
    for _ in range(room):
        seen = cache.length if cache is not None else 0
        logits = model.logits(batch_of(tokens[seen:], seen, device), cache)[-1, 0]
        token = sampling.choose(logits, generator)
        if token == stop:
            return
        tokens.append(token)
        yield token


def batch_of(tokens: Sequence[int], first: int, device: torch.device) -> Batch:
    """One sequence as a batch for inference; its first token stands at position `first`."""
    ids = torch.tensor([list(tokens)], device=device)
    positions = torch.arange(first, first + len(tokens), device=device).unsqueeze(0)
    return Batch(ids, ids, torch.zeros(ids.shape, device=device), positions, torch.zeros(1, dtype=torch.int64, device=device))
