"""Beam search: find the most probable continuations of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.inference.kv_cache import KVCache, NewTokens
from megatron.inference.sampling import mask_banned
from megatron.inference.text_batch import PIECE
from megatron.inference.texts import Predictor, check_prompt, free_positions

MAX_BEAM_WIDTH = 1000
MAX_LENGTH_PENALTY = 50  # so that the length to this power fits into a float


@dataclass(frozen=True)
class Beam:
    """One continuation of a prompt.

    Attributes:
        tokens: the generated tokens, including the one that ended the text.
        score: sum of their log-probabilities, divided by their number to the power of the length penalty.
        end: "stop" or "length".
    """

    tokens: tuple[int, ...]
    score: float
    end: str


@dataclass(frozen=True)
class BeamSearch:
    """A beam search with its settings.

    Attributes:
        width: number of unfinished continuations that are kept.
        length_penalty: exponent of the length in the score: 0 favours short texts, above 1 long ones; with 1 the score is the
            mean log-probability of a token.
        stop: the token that ends a text; None for none.

    Raises:
        ValueError: a value is out of its range.
    """

    width: int
    length_penalty: float = 1.0
    stop: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MAX_BEAM_WIDTH:
            raise ValueError(f"--beam-width {self.width} is no width; legal: 1 to {MAX_BEAM_WIDTH}")
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise ValueError(
                f"--length-penalty {self.length_penalty} is none; legal: -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}"
            )

    def score(self, log_prob: float, length: int) -> float:
        """Return the log-probability of a text, divided by its length to the power of the length penalty."""
        return log_prob / float(length**self.length_penalty)

    @torch.no_grad()
    def run(
        self,
        model: Predictor,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        banned: Callable[[int], Sequence[int]] = lambda last: (),
        use_cache: bool = True,
    ) -> Iterator[list[Beam]]:
        """Yield after every pass the finished continuations so far, best first; at the end `width` of them. Collective.

        The search ends when the best unfinished continuation, scored at its present length, is no better than the worst of
        `width` finished ones. With positive penalties this is the rule of `early_stopping=False` in transformers.

        Args:
            model: the model; all ranks get the same continuations.
            prompt: the tokens of the prompt. ValueError if it cannot be continued.
            max_new_tokens: maximum number of tokens of a continuation.
            banned: returns the tokens that must not follow a token.
            use_cache: keep keys and values; without it, every pass computes all tokens again.
        """
        check_prompt(model, prompt)
        vocabulary = model.config.known_vocab_size
        if 2 * self.width > vocabulary:
            raise ValueError(f"--beam-width {self.width} is too wide for a vocabulary of {vocabulary}: at most half of it")
        room = free_positions(model, prompt)
        limit = max_new_tokens if room is None else min(max_new_tokens, room)
        model.eval()
        reader = _Reader(model, prompt, KVCache(self.width, len(prompt) + limit) if use_cache else None)
        followed: list[tuple[int, ...]] = [()]  # the unfinished continuations
        sums = torch.zeros(1)  # [beams], their log-probabilities
        finished: list[Beam] = []
        for _ in reader.read_beginning():
            yield finished
        for length in range(1, limit + 1):
            rows, logits = reader.read(followed)
            # [beams, vocab]
            logits = torch.stack([mask_banned(found, banned(row[-1])) for found, row in zip(logits, rows, strict=True)])
            totals = (logits.log_softmax(dim=-1) + sums.unsqueeze(1)).flatten()  # [beams * vocab]
            best, places = totals.topk(2 * self.width)  # each [2 * width]: up to `width` of them may be finished
            unfinished: list[tuple[int, tuple[int, ...], float]] = []
            for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
                row, token = divmod(place, vocabulary)
                tokens = (*followed[row], token)
                if token != self.stop and length < limit:
                    unfinished.append((row, tokens, total))
                elif rank < self.width:
                    finished.append(Beam(tokens, self.score(total, length), "stop" if token == self.stop else "length"))
            finished = sorted(finished, key=lambda beam: -beam.score)[: self.width]
            yield finished
            unfinished = unfinished[: self.width]
            full = len(finished) == self.width
            if not unfinished or (full and self.score(unfinished[0][2], length) <= finished[-1].score):
                return
            followed, sums = [tokens for _, tokens, _ in unfinished], torch.tensor([total for *_, total in unfinished])
            reader.select([row for row, *_ in unfinished])


class _Reader:
    """Reads a prompt and its continuations, with a cache or without.

    Args:
        model: the model.
        prompt: the tokens of the prompt.
        cache: of the continuations; None to compute all tokens in every pass.
    """

    def __init__(self, model: Predictor, prompt: Sequence[int], cache: KVCache | None) -> None:
        self._model, self._prompt, self._cache = model, prompt, cache
        self._seen = 0  # number of tokens in the cache

    def read_beginning(self) -> Iterator[None]:
        """Read all of the prompt but its last piece; yield after every pass."""
        while self._cache is not None and len(self._prompt) - self._seen > PIECE:
            start, self._seen = self._seen, self._seen + PIECE
            self._model.predict([NewTokens(self._cache, 0, start, [self._prompt[start : self._seen]], logits=False)])
            yield

    def read(self, continuations: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
        """Return the tokens of each continuation that were not in the cache, and the logits after them, `[beams, vocab]`."""
        rows = [[*self._prompt, *tokens][self._seen :] for tokens in continuations]  # [beams, new tokens]
        cache = self._cache or KVCache(len(rows), len(rows[0]))
        logits = self._model.predict([NewTokens(cache, 0, self._seen, rows)]).logits.cpu()  # [beams, vocab]
        self._seen += len(rows[0]) if self._cache else 0
        return rows, logits

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these continuations of the last pass, in this order; one may be taken several times."""
        if self._cache is not None:
            self._cache.select(rows, self._seen)
