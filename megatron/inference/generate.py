"""Generate text from one or several prompts at once, one token at a time, with a key-value cache.

All sequences of a batch begin at position 0, so they share their positions and the length of the cache. The first pass reads as
many tokens as the shortest prompt has. From then on every sequence gets one token per pass; one that is longer than that gets
the next token of its prompt. So nothing is padded or masked, and each text is the one that its prompt alone would give.
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
        raise ValueError("the model's logits are not finite: its weights are damaged, or its training diverged")
    return logits.index_fill(-1, torch.tensor(banned, dtype=torch.int64), -torch.inf) if banned else logits


def choose_device(name: str | None, gpus: int) -> torch.device:
    """Return the device to generate on; by default a GPU if there is one.

    Args:
        name: `cpu`, `cuda` or `cuda:N`; None for the default.
        gpus: number of GPUs of this machine.

    Raises:
        ValueError: the name is unknown, or there is no such GPU.
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
            top: also return the log-probabilities of the batch's tokens, and of this many alternatives at each position.
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
    """Generate tokens until each text has ended. Collective: all ranks get the same tokens.

    Args:
        model: the model.
        texts: extended in place, up to the model's last position. ValueError for one that cannot be continued.
        max_new_tokens: maximum number of new tokens of each text.
        sampling: the rule by which tokens are chosen.
        seed: the seed; random choices follow from it and from the number of the text.
        first: number of the first text.
        stops: returns whether a text's last token ends it.
        banned: returns the tokens that must not follow a token.
        top: compute a score for every token after the first, with this many alternatives; None for no scores.
        use_cache: keep keys and values; without it every pass computes all tokens again, as a reference for tests.

    Yields:
        After every pass, the indices of the texts that grew or ended.
    """
    limits = [_limit(model, text.tokens, max_new_tokens) for text in texts]
    generators = [_generator(seed, first + i) for i in range(len(texts))]
    model.eval()
    live, cache = list(range(len(texts))), KVCache() if use_cache else None
    while live:
        seen = cache.length if cache is not None else 0
        # All texts are read as far as the shortest one, so that no padding is needed and the cache has one length.
        known = min(len(texts[i].tokens) for i in live)
        found = model.predict(batch_of_rows([texts[i].tokens[seen:known] for i in live], seen, model.device), cache, top)
        if cache is not None:
            cache.length = known
        logits, grown = found.logits.cpu(), []
        for row, i in enumerate(live):
            text = texts[i]
            if len(text.tokens) > known:  # the next token is one of its prompt
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
    """Return how many tokens may be generated after `prompt`. ValueError for one that cannot be continued."""
    check_prompt(model, prompt, reads_only=max_new_tokens == 0)
    room = free_positions(model, prompt)
    return max_new_tokens if room is None else min(max_new_tokens, room)


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the random generator of a text. Text number 0 has that of a text that is generated alone."""
    return torch.Generator().manual_seed(derive_seed(seed, "generate", *([number] if number else [])))


def _score(texts: Sequence[GeneratedText], seen: int, found: Prediction, logits: Tensor, top: int) -> None:
    """Append the scores of the tokens after position `seen`: those that the pass has read, and the one after them."""
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
    """Yield the new tokens of one text, one by one; see `extend_texts`.

    Args:
        model: the model.
        prompt: the tokens of the prompt.
        max_new_tokens: maximum number of new tokens.
        sampling: the rule by which tokens are chosen.
        seed: seed of the random choices.
        stop: the token that ends the text, which is not yielded.
        use_cache: keep keys and values of the tokens so far.
    """
    text = GeneratedText.from_prompt(prompt)

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
        device: device of the tensors.
    """
    ids = torch.tensor([list(row) for row in rows], device=device)  # [batch, seq]
    positions = torch.arange(first, first + ids.shape[1], device=device).expand(ids.shape)  # [batch, seq]
    samples = torch.zeros(len(rows), dtype=torch.int64, device=device)  # [batch]
    return Batch(ids, ids, torch.zeros(ids.shape, device=device), positions, samples)
