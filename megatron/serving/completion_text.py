"""Keep a text as the client's side knows it so far, and tell what of it can be shown."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from megatron.data.tokenizer import Tokenizer
from megatron.inference.generate import TokenScore
from megatron.serving.detokenize import REPLACEMENT_CHARACTER, added_text, token_text, token_width
from megatron.serving.engine import TextUpdate
from megatron.serving.stops import StopScan
from megatron.serving.task import GenerationTask


class CompletionText:
    """A prompt and the updates about it, and how much of it has been shown.

    Attributes:
        tokens: of the prompt and after it.
        start: number of tokens of the prompt.
        scores: of the tokens, from the second one on.
        end: why the text has ended; empty while it goes on.
    """

    def __init__(self, task: GenerationTask, prompt: Sequence[int], tokenizer: Tokenizer, *, echo: bool = False) -> None:
        self.tokens, self.start, self.scores, self.end = list(prompt), len(prompt), list[TokenScore](), ""
        self._task, self._tokenizer = task, tokenizer
        self._scan: StopScan | None = None
        self._first = 0 if echo else self.start
        self._text = self._places = 0  # how many characters and tokens have been shown
        self._offsets, self._width = list[int](), 0  # where each token's text begins in what is shown, and where the next one

    def add(self, update: TextUpdate) -> None:
        """Add the tokens that a step of the engine gave this text."""
        self.tokens += update.tokens
        self.scores += update.scores
        self.end = update.end

    @property
    def written(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.tokens) - self.start

    def show(self) -> tuple[str, dict[str, list[Any]] | None]:
        """Return the text that can be shown and has not been, and the log-probabilities of its tokens; None where nobody asked.

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
        # Only new tokens are measured: their text depends on those before, and on none behind.
        for place in range(self._first + len(self._offsets), len(self.tokens)):
            self._offsets.append(self._width)
            self._width += token_width(self._tokenizer, self.tokens, place)
        # At the end all tokens are told, also those that add no text; before it, those whose text is shown.
        everything = bool(self.end) and shown == written
        until = len(self._offsets) if everything else bisect_left(self._offsets, len(whole))
        places, self._places = range(self._places, until), max(self._places, until)
        return text, self._log_probs(places)

    def _certain(self, written: str) -> str:
        """Return the part of what is written that cannot change any more, and neither is nor begins a stop text."""
        # The bytes of a last character may not all be there yet.
        certain = written if self.end else written.rstrip(REPLACEMENT_CHARACTER)
        if not self._task.stop_texts:
            return certain
        if self._scan is None:
            self._scan = StopScan(self._task.stop_automaton)
        self._scan.read(certain)
        if self._scan.found is not None:
            return certain[: self._scan.found]
        # What may begin a stop text waits for the tokens that tell.
        return certain if self.end else certain[: len(certain) - self._scan.num_pending]

    def _log_probs(self, places: range) -> dict[str, list[Any]]:
        """Return log-probabilities in OpenAI's form, of the tokens with these places. A text's first token has none."""
        scores = [self.scores[self._first + place - 1] if self._first + place else None for place in places]
        own = [token_text(self._tokenizer, self.tokens[self._first + place]) for place in places]
        return {
            "tokens": own,
            "token_logprobs": [None if score is None else score.log_prob for score in scores],
            "top_logprobs": [None if score is None else self._best(score) for score in scores],
            "text_offset": [self._offsets[place] for place in places],
        }

    def _best(self, score: TokenScore) -> dict[str, float]:
        """Return the most probable tokens by their text; of those that are spelt alike the most probable one counts."""
        return {token_text(self._tokenizer, token): log_prob for token, log_prob in reversed(score.top)}
