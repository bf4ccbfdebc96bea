"""Continuous batching: texts of many requests share passes through the model, and come and go at any pass.

A text's tokens are the same whoever is beside it: its random numbers are its own, its prompt is cut at fixed positions into
the pieces that passes read, and attention looks at its own keys alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.inference.kv_cache import KVCache, NewTokens
from megatron.inference.prediction import Prediction, log_probabilities
from megatron.inference.sampling import NOT_FINITE, Sampling
from megatron.inference.texts import GeneratedText, Predictor, TokenScore, check_prompt, free_positions
from megatron.parallel.random import derive_seed

PIECE = 256  # tokens of a prompt that one pass reads at most
MAX_READ = 512  # tokens of prompts that one pass reads beside the texts that are being written: bounds its time


class TextGroup:
    """Texts of one request: how they go on, and how far they are.

    Attributes:
        texts: extended in place.
        error: why the group has ended early; empty where it has not.
    """

    def __init__(
        self,
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
    ) -> None:
        """Begin the texts; arguments as for `extend_texts`. ValueError for one that cannot be continued."""
        self.texts, self.sampling, self.stops, self.banned, self.top = texts, sampling, stops, banned, top
        self.limits = [_limit(model, text.tokens, max_new_tokens) for text in texts]
        self.generators = [_generator(seed, first + i) for i in range(len(texts))]
        self.known = [0] * len(texts)  # tokens of each text whose keys and values are in the cache
        room = max(len(text.tokens) + limit for text, limit in zip(texts, self.limits, strict=True))
        self.cache = KVCache(len(texts), room) if use_cache else None
        self.error = ""

    @property
    def ended(self) -> bool:
        """True when no text goes on."""
        return bool(self.error) or all(text.end for text in self.texts)

    def pending(self) -> list[_Run]:
        """Return the next pieces of all texts that go on: runs of neighbours that are equally far."""
        runs: list[_Run] = []
        for row, text in enumerate(self.texts):
            if text.end:
                continue
            if self.cache is None:
                start, end = 0, len(text.tokens)
            else:
                start = self.known[row]
                # At fixed positions, so that how a text is read does not depend on what else is read.
                end = min(len(text.tokens), start - start % PIECE + PIECE)
            last = runs[-1] if runs else None
            if last is not None and (last.row + last.rows, last.start, last.end) == (row, start, end):
                runs[-1] = _Run(self, last.row, last.rows + 1, start, end, max(last.left, len(text.tokens) - start))
            else:
                runs.append(_Run(self, row, 1, start, end, len(text.tokens) - start))
        return runs

    def choose(self, row: int, logits: Tensor, best: int) -> None:
        """Add a token to a text that has been read to its end, unless it has as many as it may.

        Args:
            row: number of the text.
            logits: fp32 `[vocab]` on the CPU, all finite.
            best: the most probable token.
        """
        text = self.texts[row]
        if text.written < self.limits[row]:
            banned = self.banned(text.tokens[-1])
            greedy = self.sampling.temperature == 0.0 and not banned
            token = best if greedy else self.sampling.choose(logits, self.generators[row], text.written, banned)
            text.tokens.append(token)
            text.end = "stop" if self.stops(text) else ""
        if text.written == self.limits[row]:
            text.end = text.end or "length"


@dataclass(frozen=True)
class _Run:
    """New tokens of neighbouring texts of a group, from `start` to before `end`; the longest has `left` to be read."""

    group: TextGroup
    row: int
    rows: int
    start: int
    end: int
    left: int

    @property
    def count(self) -> int:
        return self.end - self.start

    @property
    def texts(self) -> Sequence[GeneratedText]:
        return self.group.texts[self.row : self.row + self.rows]

    def first(self, rows: int) -> _Run:
        """Return the run of its first texts."""
        return _Run(self.group, self.row, min(rows, self.rows), self.start, self.end, self.left)

    def piece(self) -> NewTokens:
        group, texts = self.group, self.texts
        cache = group.cache or KVCache(self.rows, self.end)
        scores = group.top is not None
        return NewTokens(
            cache,
            self.row if group.cache else 0,
            self.start,
            [text.tokens[self.start : self.end] for text in texts],
            # Inside of a prompt nobody asks what comes next, unless its tokens are scored.
            logits=scores or any(len(text.tokens) == self.end for text in texts),
            scored=scores,
        )


class TextBatch:
    """Groups of texts that share passes. Collective where the model is: all ranks add and remove the same ones."""

    def __init__(self, model: Predictor) -> None:
        self.model = model
        self.groups: list[TextGroup] = []
        model.eval()

    def add(self, group: TextGroup) -> None:
        """Let a group take part from the next pass on."""
        self.groups.append(group)

    def remove(self, group: TextGroup) -> None:
        """Let a group take part no longer, whether it has ended or not."""
        if group in self.groups:
            self.groups.remove(group)

    @torch.no_grad()
    def step(self) -> list[tuple[TextGroup, list[int]]]:
        """Compute one pass: a token for each text that is being written, and pieces of the prompts that are being read.

        A group whose logits are not finite ends with an error. What fails in the model leaves all texts as they were.

        Returns:
            The groups that took part, each with the numbers of the texts that grew or ended. Those that ended are removed.
        """
        runs = self._plan()
        pieces = [run.piece() for run in runs]
        top = max((run.group.top or 0 for run in runs), default=0)
        found = self.model.predict(pieces, top)
        _score_inside(runs, found)
        logits = found.logits.cpu()  # [texts, vocab]
        best, finite = _best(logits)
        grown: dict[TextGroup, list[int]] = {run.group: [] for run in runs}
        followed: list[_Followed] = []
        place = 0
        for run, piece in zip(runs, pieces, strict=True):
            group = run.group
            for row, text in enumerate(run.texts, run.row):
                group.known[row] = run.end
                if not piece.logits:
                    continue
                if not finite[place]:
                    group.error = NOT_FINITE
                elif len(text.tokens) == run.end:
                    group.choose(row, logits[place], best[place])
                    grown[group].append(row)
                if group.top is not None and len(text.scores) < run.end < len(text.tokens):
                    followed.append(_Followed(place, text, run.end, group.top))
                place += 1
        _score_following(followed, logits, top)
        self.groups = [group for group in self.groups if not group.ended]
        return list(grown.items())

    def _plan(self) -> list[_Run]:
        """Choose what the next pass computes: all texts that are being written, and as much of prompts as time allows."""
        chosen, read = list[_Run](), list[_Run]()
        for group in self.groups:
            for run in group.pending():
                (chosen if run.count == 1 or group.cache is None else read).append(run)
        # The oldest request goes on at every pass, then whoever has least to read: a short prompt waits for no long one.
        read[1:] = sorted(read[1:], key=lambda run: run.left)
        room = MAX_READ
        for run in read:
            if run.count <= room or room == MAX_READ:
                chosen.append(run.first(max(1, room // run.count)))
                room -= chosen[-1].rows * run.count
        return chosen


def _limit(model: Predictor, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens may be generated after `prompt`. ValueError for one that cannot be continued."""
    check_prompt(model, prompt, reads_only=max_new_tokens == 0)
    room = free_positions(model, prompt)
    return max_new_tokens if room is None else min(max_new_tokens, room)


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the random generator of a text. Text number 0 has that of a text that is generated alone."""
    return torch.Generator().manual_seed(derive_seed(seed, "generate", *([number] if number else [])))


def _best(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Return the most probable token of each row `[texts, vocab]`, and whether all of the row is finite."""
    if not len(logits):
        return [], []
    least, most = logits.aminmax(dim=-1)  # each [texts]; NaN where there is one in the row
    return logits.argmax(dim=-1).tolist(), (least.isfinite() & most.isfinite()).tolist()


@dataclass(frozen=True)
class _Followed:
    """A text whose logits stand in a row `place` of a pass, and whose token `number` follows; it wants `top` alternatives."""

    place: int
    text: GeneratedText
    number: int
    top: int


def _score_inside(runs: Sequence[_Run], found: Prediction) -> None:
    """Give the tokens inside of a pass their scores."""
    log_probs, ids = found.log_probs.tolist(), found.ids.tolist()
    at = 0
    for run in runs:
        if run.group.top is None:
            continue
        for text in run.texts:
            for before in range(run.start, run.end - 1):
                if before == len(text.scores):
                    text.scores.append(_token_score(log_probs[at], ids[at], run.group.top))
                at += 1


def _score_following(followed: Sequence[_Followed], logits: Tensor, top: int) -> None:
    """Give the tokens that follow a pass their scores.

    Args:
        followed: their texts.
        logits: of the pass, `[texts, vocab]`.
        top: the most alternatives of any of them.
    """
    if not followed:
        return
    tokens = torch.tensor([one.text.tokens[one.number] for one in followed])  # [followed]
    log_probs, ids = log_probabilities(logits[[one.place for one in followed]], tokens, top)  # [followed, 1 + top]
    for one, values, names in zip(followed, log_probs.tolist(), ids.tolist(), strict=True):
        one.text.scores.append(_token_score(values, names, one.top))


def _token_score(log_probs: list[float], ids: list[int], top: int) -> TokenScore:
    """Return a token's score from its own log-probability and those of the most probable tokens there."""
    return TokenScore(log_probs[0], tuple(zip(ids[1 : 1 + top], log_probs[1 : 1 + top], strict=True)))
