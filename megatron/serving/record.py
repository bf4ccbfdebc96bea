"""A text as the client's side knows it so far, and what of it can be shown."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from megatron.data.tokenizer import Tokenizer
from megatron.inference.generate import TokenScore
from megatron.serving.engine import Update
from megatron.serving.stops import StopScan
from megatron.serving.task import Task
from megatron.serving.words import UNFINISHED, added_text, single, width


class Record:
    """A prompt and the updates about it, and how much of it has been shown.

    tokens: of the prompt and after it. echo: the prompt is shown too.
    """

    def __init__(self, task: Task, prompt: Sequence[int], tokenizer: Tokenizer, *, echo: bool = False) -> None:
        self.tokens, self.start, self.scores, self.end = list(prompt), len(prompt), list[TokenScore](), ""
        self._task, self._tokenizer = task, tokenizer
        self._scan: StopScan | None = None
        self._first = 0 if echo else self.start
        self._text = self._places = 0  # how many characters and tokens have been shown
        self._offsets, self._width = list[int](), 0  # where each token's text begins in what is shown, and where the next one

    def add(self, update: Update) -> None:
        """Add the tokens that a step of the engine gave this text."""
        self.tokens += update.tokens
        self.scores += update.scores
        self.end = update.end

    @property
    def written(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.tokens) - self.start

    def show(self) -> tuple[str, dict[str, list[Any]] | None]:
        """The text that can be shown and has not been, and the log-probabilities of its tokens, where they were asked for.

        Neither the token that ends the text nor a stop text, nor what comes after one, is ever shown; but the token that ends
        it has a log-probability, since who asks for one more token than a text has takes away the last of them.
        """
        ended_by_run = self.end == "stop" and any(tuple(self.tokens[-len(run) :]) == run for run in self._task.stop_runs)
        tokens = self.tokens[: len(self.tokens) - ended_by_run]
        prompt = added_text(self._tokenizer, tokens[: self.start], self._first)
        written = added_text(self._tokenizer, tokens, self.start)
        shown = self._certain(written)
        whole = prompt + shown
        text, self._text = whole[self._text :], max(self._text, len(whole))
        if self._task.top is None:
            return text, None
        for place in range(self._first + len(self._offsets), len(self.tokens)):
            self._offsets.append(self._width)
            self._width += width(self._tokenizer, self.tokens, place)
        everything = bool(self.end) and shown == written
        until = len(self._offsets) if everything else bisect_left(self._offsets, len(whole))
        places, self._places = range(self._places, until), max(self._places, until)
        return text, self._log_probs(places)

    def _certain(self, written: str) -> str:
        """The part of what is written that cannot change any more, and neither is nor begins a stop text."""
        certain = written if self.end else written.rstrip(UNFINISHED)
        if not self._task.stop_texts:
            return certain
        if self._scan is None:
            self._scan = StopScan(self._task.stop_automaton)
        self._scan.read(certain)
        if self._scan.found is not None:
            return certain[: self._scan.found]
        return certain if self.end else certain[: len(certain) - self._scan.held]

    def _log_probs(self, places: range) -> dict[str, list[Any]]:
        """In OpenAI's form, of the tokens with these places in what is shown. A text's first token has none."""
        scores = [self.scores[self._first + place - 1] if self._first + place else None for place in places]
        own = [single(self._tokenizer, self.tokens[self._first + place]) for place in places]
        return {
            "tokens": own,
            "token_logprobs": [None if score is None else score.log_prob for score in scores],
            "top_logprobs": [None if score is None else self._best(score) for score in scores],
            "text_offset": [self._offsets[place] for place in places],
        }

    def _best(self, score: TokenScore) -> dict[str, float]:
        """Of tokens that are spelt alike the most probable one counts."""
        return {single(self._tokenizer, token): log_prob for token, log_prob in reversed(score.top)}
