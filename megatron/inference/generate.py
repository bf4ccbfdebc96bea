"""Text from a trained model: one or several prompts at once, one token at a time, with a cache of keys and values.

All sequences of a batch begin at position 0, so they share their positions and one length of the cache. The first pass reads as
much as the shortest prompt has; from then on every sequence gets one token a pass, where one that is still in its prompt gets
its own next one. So nothing is padded or masked, and each text is what its prompt alone would give.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.contract import Batch
from megatron.inference.kv_cache import KVCache
from megatron.inference.prediction import Prediction, log_probabilities
from megatron.parallel.random import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most probable token. top_k: only the k most probable ones; 0 is all. top_p: only the most
    probable ones that together reach this probability; 0 and 1 are all (nucleus sampling, arXiv 1904.09751). top_p_decay:
    top_p is multiplied by it after each token, 0 leaves it; top_p_bound: but it falls no lower than this.
    ValueError for values that make no sense.
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
        """The next token from logits `[vocab]`; on the CPU, so that a seed gives the same text on every device.

        Of equal logits the lower token counts as the more probable. written: how many tokens this text has got already.
        banned: tokens that must not be chosen. ValueError for logits that are not finite.
        """
        logits = mask_banned(logits, banned)
        if self.temperature == 0.0:
            return int(logits.argmax())
        # In fp64 a temperature of any size divides to zero or to minus infinity, never to NaN.
        ordered, order = logits.sort(descending=True, stable=True)
        kept = ordered[: self.top_k or None].double()
        probabilities = ((kept - kept[0]) / self.temperature).softmax(dim=-1)
        top_p = self.top_p
        if self.top_p_decay > 0.0:
            top_p = max(top_p * self.top_p_decay**written, self.top_p_bound)
        if 0.0 < self.top_p < 1.0 or self.top_p_decay > 0.0:
            before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.masked_fill((before >= top_p).logical_and_(before > 0.0), 0.0)
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def mask_banned(logits: Tensor, banned: Sequence[int] = ()) -> Tensor:
    """Logits `[vocab]` on the CPU, those of `banned` tokens minus infinity; ValueError for any that are not finite."""
    logits = logits.cpu()
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's logits are not finite: its weights are damaged, or its training diverged")
    return logits.index_fill(-1, torch.tensor(banned, dtype=torch.int64), -torch.inf) if banned else logits


def choose_device(name: str | None, gpus: int) -> torch.device:
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
    """A whole model: an `inference.pipeline.Pipeline`, in one process or over several ranks."""

    config: ModelConfig
    device: torch.device

    def eval(self) -> object: ...

    def predict(self, batch: Batch, cache: KVCache | None = None, top: int | None = None) -> Prediction:
        """What follows `batch`, and with `top` how probable its own tokens were; with a cache, `batch` holds only the new
        tokens."""
        ...


def free_positions(model: Predictor, prompt: Sequence[int]) -> int | None:
    """Tokens that the model can write after `prompt`: its free learned positions; None where nothing ends them."""
    if model.config.position_embedding_type != "learned_absolute":
        return None
    return model.config.max_position_embeddings - len(prompt)


def check_prompt(model: Predictor, prompt: Sequence[int], *, reads_only: bool = False) -> None:
    """ValueError for an empty prompt, one with unknown tokens, and one that leaves no position free.

    reads_only: nothing will be written after it.
    """
    room = free_positions(model, prompt)
    if not prompt:
        raise ValueError("the prompt becomes no tokens: generation needs at least one to go on from")
    if room is not None and room < (0 if reads_only else 1):
        last = len(prompt) + room
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model {last} positions: shorten the prompt")
    vocabulary = model.config.vocabulary
    if outside := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"token {outside[0]} of the prompt is outside of the vocabulary of {vocabulary}")


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability given what stands before it, and those of the most probable tokens there, best first."""

    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class GeneratedText:
    """A prompt, and what is written after it so far.

    tokens: of both. start: where the written ones begin. scores: of tokens[1:], where they were asked for.
    end: "" while it goes on, "stop" after the token that ended it, which is the last of `tokens`, "length" after as many as
    were allowed.
    """

    tokens: list[int]
    start: int
    scores: list[TokenScore] = field(default_factory=list)
    end: str = ""

    @classmethod
    def after(cls, prompt: Sequence[int]) -> GeneratedText:
        """Begin a text after a prompt, with nothing written."""
        return cls(list(prompt), len(prompt))

    @property
    def written(self) -> int:
        """Number of tokens that are written so far."""
        return len(self.tokens) - self.start


@torch.no_grad()
def extend_texts(
    model: Predictor,
    texts: Sequence[GeneratedText],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    first: int = 0,
    stops: Callable[[GeneratedText], bool] = lambda text: False,
    banned: Callable[[int], Sequence[int]] = lambda last: (),
    top: int | None = None,
    use_cache: bool = True,
) -> Iterator[list[int]]:
    """Add tokens to `texts` until each has ended; yields after every pass, with the numbers of the texts that grew or ended.

    On several ranks all call this, and all get the same tokens. Each text gets `max_new_tokens`, or less where `stops` says
    that its last token ends it, or at the model's last position. Its random choices follow from the seed and from its number,
    which for the first of them is `first`. banned: tokens that must not follow a token. top: None for no scores; else every
    token after the first gets one, with that many alternatives. use_cache=False computes everything again for each token: the
    reference for the cache.
    ValueError for prompts that cannot be continued.
    """
    limits = [_limit(model, text.tokens, max_new_tokens) for text in texts]
    generators = [_generator(seed, first + i) for i in range(len(texts))]
    model.eval()
    live, cache = list(range(len(texts))), KVCache() if use_cache else None
    while live:
        seen = cache.length if cache is not None else 0
        known = min(len(texts[i].tokens) for i in live)
        found = model.predict(batch_of_rows([texts[i].tokens[seen:known] for i in live], seen, model.device), cache, top)
        if cache is not None:
            cache.length = known
        logits, grown = found.logits.cpu(), []
        for row, i in enumerate(live):
            text = texts[i]
            if len(text.tokens) > known:
                continue
            grown.append(i)
            if text.written < limits[i]:
                text.tokens.append(sampling.choose(logits[row], generators[i], text.written, banned(text.tokens[-1])))
                text.end = "stop" if stops(text) else ""
            if text.written == limits[i]:
                text.end = text.end or "length"
        if top is not None:
            _score([texts[i] for i in live], seen, found, logits, top)
        yield grown
        rows = [row for row, i in enumerate(live) if not texts[i].end]
        if cache is not None and 0 < len(rows) < len(live):
            cache.select(rows)
        live = [live[row] for row in rows]


def _limit(model: Predictor, prompt: Sequence[int], max_new_tokens: int) -> int:
    """How many tokens are written after `prompt`, at most. ValueError for one that cannot be continued."""
    check_prompt(model, prompt, reads_only=max_new_tokens == 0)
    room = free_positions(model, prompt)
    return max_new_tokens if room is None else min(max_new_tokens, room)


def _generator(seed: int, number: int) -> torch.Generator:
    """The random choices of one text. Number 0 has those of a text that is written alone."""
    return torch.Generator().manual_seed(derive_seed(seed, "generate", *([number] if number else [])))


def _score(texts: Sequence[GeneratedText], seen: int, found: Prediction, logits: Tensor, top: int) -> None:
    """Give the tokens after position `seen` their scores: those inside of the pass, and the one that follows it."""
    known = seen + found.log_probs.shape[0] + 1
    following = torch.tensor([text.tokens[known] if len(text.tokens) > known else 0 for text in texts])
    last_log_probs, last_ids = log_probabilities(logits, following, top)
    log_probs, ids = found.log_probs.tolist(), found.ids.tolist()
    log_probs.append(last_log_probs.tolist())
    ids.append(last_ids.tolist())
    for row, text in enumerate(texts):
        for place in range(len(text.scores), min(known, len(text.tokens) - 1)):
            own, *best = log_probs[place - seen][row]
            text.scores.append(TokenScore(own, tuple(zip(ids[place - seen][row][1:], best, strict=True))))


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
    """Yield new tokens until `max_new_tokens`, the token `stop` (not yielded), or the last position. See `extend_texts`."""
    text = GeneratedText.after(prompt)

    def stops(text: GeneratedText) -> bool:
        return text.tokens[-1] == stop

    for _ in extend_texts(
        model, [text], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stops=stops, use_cache=use_cache
    ):
        if text.end == "stop" or not text.written:
            return
        yield text.tokens[-1]


def batch_of_rows(rows: Sequence[Sequence[int]], first: int, device: torch.device) -> Batch:
    """Sequences of equal length as a batch for inference; their first tokens stand at position `first`."""
    ids = torch.tensor([list(row) for row in rows], device=device)
    positions = torch.arange(first, first + ids.shape[1], device=device).expand(ids.shape)
    samples = torch.zeros(len(rows), dtype=torch.int64, device=device)
    return Batch(ids, ids, torch.zeros(ids.shape, device=device), positions, samples)
