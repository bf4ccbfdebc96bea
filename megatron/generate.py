"""Text from a trained model, one token at a time, with a cache of keys and values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.contract import Batch
from megatron.model.attention import Cache
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
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"--temperature {self.temperature} is no temperature; legal: 0 (greedy) and above, finite")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} is negative; legal: 0 (all) and above")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"--top-p {self.top_p} is no probability; legal: 0 to 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token from logits `[vocab]`; on the CPU, so that a seed gives the same text on every device.

        Of equal logits the lower token counts as the more probable. ValueError for logits that are not finite.
        """
        logits = logits.cpu()
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's logits are not finite: its weights are damaged, or its training diverged")
        if self.temperature == 0.0:
            return int(logits.argmax())
        # In fp64 a temperature of any size divides to zero or to minus infinity, never to NaN.
        ordered, order = logits.sort(descending=True, stable=True)
        kept = ordered[: self.top_k or None].double()
        probabilities = ((kept - kept[0]) / self.temperature).softmax(dim=-1)
        if 0.0 < self.top_p < 1.0:
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def device_of(name: str | None, gpus: int) -> torch.device:
    """The device to generate on: `cpu`, `cuda` or `cuda:N`; by default a GPU where there is one.

    gpus: how many this machine has. ValueError for another name, and for a GPU that is not there.
    """
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    if (match := re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)) is None:
        raise ValueError(f"--device {name} is not known; legal: cpu, cuda, cuda:N")
    if name != "cpu" and int(match[1] or 0) >= gpus:
        raise ValueError(f"--device {name} is not there: PyTorch finds {gpus} GPUs on this machine; --device cpu needs none")
    return torch.device(name)


class Predictor(Protocol):
    """A whole model: a `model.gpt.GPT`, or a `pipeline.inference.Pipeline` over several ranks."""

    config: ModelConfig
    device: torch.device

    def eval(self) -> object: ...

    def logits(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """fp32 `[seq, batch, vocab]`; with a cache, `batch` holds only the new tokens."""
        ...


def room_after(model: Predictor, prompt: Sequence[int]) -> int | None:
    """Tokens that the model can write after `prompt`: its free learned positions; None where nothing ends them."""
    if model.config.position_embedding_type != "learned_absolute":
        return None
    return model.config.size("max_position_embeddings") - len(prompt)


@torch.no_grad()
def generate(
    model: Predictor,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield new tokens until `max_new_tokens`, the token `stop` (not yielded), or the model's last position.

    On several ranks all call this, and all get the same tokens. prompt: token ids, at least one. use_cache=False computes
    everything again for each token: the reference for the cache. ValueError for an empty prompt, and for one that leaves no
    position free.
    """
    room = room_after(model, prompt)
    if not prompt:
        raise ValueError("the prompt becomes no tokens: generation needs at least one to go on from")
    if room is not None and room < 1:
        last = len(prompt) + room
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model {last} positions: shorten the prompt")
    vocabulary = model.config.size("vocab_size")
    if outside := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"token {outside[0]} of the prompt is outside of the vocabulary of {vocabulary}")
    generator = torch.Generator().manual_seed(derive_seed(seed, "generate"))
    model.eval()
    tokens, cache = list(prompt), Cache() if use_cache else None
    for _ in range(max_new_tokens if room is None else min(max_new_tokens, room)):
        seen = cache.length if cache is not None else 0
        logits = model.logits(batch_of(tokens[seen:], seen, model.device), cache)[-1, 0]
        if cache is not None:
            cache.length = len(tokens)
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
