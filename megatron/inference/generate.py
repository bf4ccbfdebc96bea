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
    """Rule by which the next token is chosen.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0 is all.
        top_p: only the most probable ones that together reach this probability; 0 and 1 are all (nucleus sampling,
            arXiv 1904.09751).
        top_p_decay: top_p is multiplied by it after each token; 0 leaves it.
        top_p_bound: top_p falls no lower than this.

    Raises:
        ValueError: a value makes no sense.
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
        """Choose the next token; on the CPU, so that a seed gives the same text on every device.

        Args:
            logits: `[vocab]`. Of equal ones the lower token counts as the more probable.
            generator: of the text, on the CPU.
            written: tokens that the text has got already.
            banned: tokens that must not be chosen.

        Raises:
            ValueError: a logit is not finite.
        """
        logits = mask_banned(logits, banned)
        if self.temperature == 0.0:
            return int(logits.argmax())
        # In fp64 a temperature of any size divides to zero or to minus infinity, never to NaN.
        ordered, order = logits.sort(descending=True, stable=True)  # [vocab]
        kept = ordered[: self.top_k or None].double()  # [k], as are the probabilities
        probabilities = ((kept - kept[0]) / self.temperature).softmax(dim=-1)
        top_p = self.top_p
        if self.top_p_decay > 0.0:
            top_p = max(top_p * self.top_p_decay**written, self.top_p_bound)
        if 0.0 < self.top_p < 1.0 or self.top_p_decay > 0.0:
            # The sum without the token itself, so the one that crosses top_p stays, and the first one always.
            before = probabilities.cumsum(0) - probabilities  # [k]
            probabilities = probabilities.masked_fill((before >= top_p).logical_and_(before > 0.0), 0.0)
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def mask_banned(logits: Tensor, banned: Sequence[int] = ()) -> Tensor:
    """Return logits `[vocab]` on the CPU, those of `banned` tokens minus infinity; ValueError where one is not finite."""
    logits = logits.cpu()
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's logits are not finite: its weights are damaged, or its training diverged")
    return logits.index_fill(-1, torch.tensor(banned, dtype=torch.int64), -torch.inf) if banned else logits


def choose_device(name: str | None, gpus: int) -> torch.device:
    """Return the device to generate on; by default a GPU where there is one.

    Args:
        name: `cpu`, `cuda` or `cuda:N`; None for the default.
        gpus: number of GPUs of this machine.

    Raises:
        ValueError: the name is not known, or its GPU is not there.
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
        """Predict the token after `batch`, and with `top` the probabilities of its own tokens.

        Args:
            batch: sequences of equal length; with a cache only their new tokens.
            cache: keys and values of the tokens before.
            top: also the log-probabilities of the batch's tokens, and of this many alternatives at each place.
        """
        ...


def free_positions(model: Predictor, prompt: Sequence[int]) -> int | None:
    """Return how many tokens the model can write after `prompt`: its free learned positions; None where nothing ends them."""
    if model.config.position_embedding_type != "learned_absolute":
        return None
    return model.config.max_position_embeddings - len(prompt)


def check_prompt(model: Predictor, prompt: Sequence[int], *, reads_only: bool = False) -> None:
    """Check that a prompt can be continued.

    Args:
        model: the model that reads it.
        prompt: its tokens.
        reads_only: nothing will be written after it.

    Raises:
        ValueError: it is empty, has unknown tokens, or leaves no position free.
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
    """A token's log-probability given what stands before it, and those of the most probable tokens there, best first."""

    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class GeneratedText:
    """A prompt, and the tokens that are written after it so far.

    Attributes:
        tokens: of both.
        start: index of the first written one.
        scores: of tokens[1:], where they were asked for.
        end: "" while it goes on, "stop" after the token that ended it, which is the last of `tokens`, "length" after as many
            as were allowed.
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
    """Add tokens to texts until each has ended. Collective: all ranks get the same tokens.

    Args:
        model: the model.
        texts: extended in place, up to the model's last position. ValueError for one that cannot be continued.
        max_new_tokens: the most that each text gets.
        sampling: the rule by which tokens are chosen.
        seed: random choices follow from it and from the number of the text.
        first: number of the first text.
        stops: returns whether a text's last token ends it.
        banned: returns the tokens that must not follow a token.
        top: every token after the first gets a score, with that many alternatives; None for no scores.
        use_cache: keep keys and values; without, everything is computed again: the reference for the cache.

    Yields:
        After every pass the numbers of the texts that grew or ended.
    """
    limits = [_limit(model, text.tokens, max_new_tokens) for text in texts]
    generators = [_generator(seed, first + i) for i in range(len(texts))]
    model.eval()
    live, cache = list(range(len(texts))), KVCache() if use_cache else None
    while live:
        seen = cache.length if cache is not None else 0
        # All texts read as far as the shortest one, so that a pass needs no padding and one length for the cache.
        known = min(len(texts[i].tokens) for i in live)
        found = model.predict(batch_of_rows([texts[i].tokens[seen:known] for i in live], seen, model.device), cache, top)
        if cache is not None:
            cache.length = known
        logits, grown = found.logits.cpu(), []
        for row, i in enumerate(live):
            text = texts[i]
            if len(text.tokens) > known:  # still in its prompt
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
    """Return how many tokens may be written after `prompt`. ValueError for one that cannot be continued."""
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


def generate_tokens(
    model: Predictor,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield the new tokens of one text, one by one. See `extend_texts`.

    Args:
        model: the model.
        prompt: tokens to go on from.
        max_new_tokens: the most that are yielded.
        sampling: the rule by which tokens are chosen.
        seed: of the random choices.
        stop: the token that ends the text, which is not yielded.
        use_cache: keep keys and values of the tokens so far.
    """
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
    """Return sequences as a batch for inference.

    Args:
        rows: token sequences of equal length.
        first: position of their first tokens.
        device: of the tensors.
    """
    ids = torch.tensor([list(row) for row in rows], device=device)  # [batch, seq]
    positions = torch.arange(first, first + ids.shape[1], device=device).expand(ids.shape)  # [batch, seq]
    samples = torch.zeros(len(rows), dtype=torch.int64, device=device)  # [batch]
    return Batch(ids, ids, torch.zeros(ids.shape, device=device), positions, samples)
