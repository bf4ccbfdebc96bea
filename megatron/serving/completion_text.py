"""Collect the tokens of a completion, and return the parts of its text that can already be sent to the client."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from megatron.data.tokenizer import Tokenizer
from megatron.inference.texts import TokenScore
from megatron.serving.detokenize import REPLACEMENT_CHARACTER, added_text, token_text, token_width
from megatron.serving.stops import StopScan
from megatron.serving.task import GenerationTask
from megatron.serving.waiting import TextUpdate


class CompletionText:
    """A prompt with its completion, and how much of it has been sent.

    Attributes:
        tokens: the tokens of the prompt and the generated ones.
        start: number of tokens of the prompt.
        scores: log-probabilities of the tokens, from the second one on.
        end: `stop` or `length` when the text has ended; before that empty.
    """

    def __init__(self, task: GenerationTask, prompt: Sequence[int], tokenizer: Tokenizer, *, echo: bool = False) -> None:
        self.tokens, self.start, self.scores, self.end = list(prompt), len(prompt), list[TokenScore](), ""
        self._task, self._tokenizer = task, tokenizer
        self._scan: StopScan | None = None
        self._first = 0 if echo else self.start
        self._sent_characters = self._sent_tokens = 0  # numbers that `show` has returned
        self._offsets, self._next_offset = list[int](), 0  # position in the text of each token, and of the next one

    def add(self, update: TextUpdate) -> None:
        """Add the tokens and scores of an update of the engine."""
        self.tokens += update.tokens
        self.scores += update.scores
        self.end = update.end

    @property
    def written(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.tokens) - self.start

    def show(self) -> tuple[str, dict[str, list[Any]] | None]:
        """Return the new part of the text that can be sent, and the log-probabilities of its tokens, None if not requested.

        The token that ends the text, a stop text and the text after it are never returned. The token that ends the text has a
        log-probability, however: clients that request one token more than a text has drop the last entry.
        """
        ended_by_run = self.end == "stop" and any(tuple(self.tokens[-len(run) :]) == run for run in self._task.stop_runs)
        tokens = self.tokens[: len(self.tokens) - ended_by_run]
        prompt = added_text(self._tokenizer, tokens[: self.start], self._first)
        written = added_text(self._tokenizer, tokens, self.start)
        shown = self._certain(written)
        whole = prompt + shown
        text, self._sent_characters = whole[self._sent_characters :], max(self._sent_characters, len(whole))
        if self._task.top is None:
            return text, None
        # Only new tokens are decoded, since the text of a token depends only on those before it.
        for place in range(self._first + len(self._offsets), len(self.tokens)):
            self._offsets.append(self._next_offset)
            self._next_offset += token_width(self._tokenizer, self.tokens, place)
        # After the end, all tokens are returned, even those without text; before it, those whose text is returned.
        is_complete = bool(self.end) and shown == written
        until = len(self._offsets) if is_complete else bisect_left(self._offsets, len(whole))
        places, self._sent_tokens = range(self._sent_tokens, until), max(self._sent_tokens, until)
        return text, self._log_probs(places)

    def _certain(self, written: str) -> str:
        """Return the part of the generated text that later tokens cannot change, up to a stop text or what may begin one."""
        # The last character may be incomplete.
        certain = written if self.end else written.rstrip(REPLACEMENT_CHARACTER)
        if not self._task.stop_texts:
            return certain
        if self._scan is None:
            self._scan = StopScan(self._task.stop_automaton)
        self._scan.read(certain)
        if self._scan.found is not None:
            return certain[: self._scan.found]
        # A possible beginning of a stop text is held back until later tokens decide whether it is one.
        return certain if self.end else certain[: len(certain) - self._scan.num_pending]

    def _log_probs(self, places: range) -> dict[str, list[Any]]:
        """Return log-probabilities of the tokens at these positions, in OpenAI's form. A text's first token has none."""
        scores = [self.scores[self._first + place - 1] if self._first + place else None for place in places]
        own = [token_text(self._tokenizer, self.tokens[self._first + place]) for place in places]
        return {
            "tokens": own,
            "token_logprobs": [None if score is None else score.log_prob for score in scores],
            "top_logprobs": [None if score is None else self._best(score) for score in scores],
            "text_offset": [self._offsets[place] for place in places],
        }

    def _best(self, score: TokenScore) -> dict[str, float]:
        """Return the log-probabilities of the most probable tokens by text; for equal texts, the highest one."""
        return {token_text(self._tokenizer, token): log_prob for token, log_prob in reversed(score.top)}
