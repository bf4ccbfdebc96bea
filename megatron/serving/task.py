"""Describe a generation task in tokens and numbers, the same for all APIs and all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.data.tokenizer import Tokenizer
from megatron.inference.beam_search import BeamSearch
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText, Predictor, check_prompt, free_positions
from megatron.serving.detokenize import REPLACEMENT_CHARACTER, added_text
from megatron.serving.fields import RequestError
from megatron.serving.stops import StopScan, StopTexts

MAX_PROMPTS = 128


@dataclass(frozen=True)
class GenerationTask:
    """Prompts, and the settings of their continuation.

    Attributes:
        prompts: the tokens of each prompt.
        max_new_tokens: maximum number of tokens generated after each prompt.
        sampling: the rule by which tokens are chosen.
        seed: seed of the random numbers.
        top: number of alternatives in the score of a token; None for no scores.
        stop_runs: sequences of tokens that end a text.
        stop_texts: strings that end a text when they appear in its generated part.
        banned_after: pairs of a token and one that must not follow it.
        beam: a beam search for the only prompt, instead of sampling.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    top: int | None = None
    stop_runs: tuple[tuple[int, ...], ...] = ()
    stop_texts: tuple[str, ...] = ()
    banned_after: tuple[tuple[int, int], ...] = ()
    beam: BeamSearch | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GenerationTask:
        """Return the task whose fields `asdict` gave, and JSON handed on."""
        held = dict(fields)
        pairs = [(before, banned) for before, banned in held.pop("banned_after")]
        beam = held.pop("beam")
        return cls(
            prompts=tuple(map(tuple, held.pop("prompts"))),
            sampling=Sampling(**held.pop("sampling")),
            stop_runs=tuple(map(tuple, held.pop("stop_runs"))),
            stop_texts=tuple(held.pop("stop_texts")),
            banned_after=tuple(pairs),
            beam=None if beam is None else BeamSearch(**beam),
            **held,
        )

    def check(self, model: Predictor, max_tokens_total: int) -> None:
        """Raise RequestError if the model or the server's limits do not allow the task.

        Args:
            model: the model that is served.
            max_tokens_total: maximum number of tokens of a request, prompts and generated texts together.
        """
        try:
            for prompt in self.prompts:
                check_prompt(model, prompt, reads_only=True)
        except ValueError as error:
            raise RequestError(str(error)) from error
        longest = max(self.prompts, key=len)
        room = free_positions(model, longest)
        if room is not None and self.max_new_tokens > room:
            positions = len(longest) + room
            raise RequestError(
                f"the longest prompt has {len(longest)} tokens and {self.max_new_tokens} are to be written, the model has "
                f"{positions} positions: shorten the prompt or ask for {room} at most"
            )
        if self.size > max_tokens_total:
            raise RequestError(
                f"the request takes {self.size} tokens, this server allows {max_tokens_total} (--max-tokens-to-oom)"
            )
        vocabulary = model.config.known_vocab_size
        if self.beam is not None and 2 * self.beam.width > vocabulary:
            raise RequestError(
                f"beam_width {self.beam.width} is more than half of the {vocabulary} tokens that there are", "beam_width"
            )
        if self.beam is not None and self.beam.stop is not None and self.beam.stop >= vocabulary:
            raise RequestError(f"stop_token {self.beam.stop} is outside of the vocabulary of {vocabulary}", "stop_token")
        if self.top is not None and self.top > vocabulary:
            raise RequestError(f"logprobs {self.top} is more than the vocabulary of {vocabulary}", "logprobs")

    @property
    def rows(self) -> int:
        """Number of texts that are continued at once."""
        return len(self.prompts) if self.beam is None else self.beam.width

    @property
    def size(self) -> int:
        """Number of tokens of its key-value cache, which has a row for each text, of the length of the longest."""
        return self.rows * (max(map(len, self.prompts)) + self.max_new_tokens)

    @cached_property
    def stop_automaton(self) -> StopTexts:
        """The automaton of the stop texts, built at the task's first token, so that queued tasks need no memory for it."""
        return StopTexts(self.stop_texts)

    def stops(self, tokenizer: Tokenizer) -> Callable[[GeneratedText], bool]:
        """Return a function that tells whether the last token of a text of this task ends the text."""
        scans: dict[int, StopScan] = {}

        def stops(text: GeneratedText) -> bool:
            if any(tuple(text.tokens[-len(run) :]) == run for run in self.stop_runs):
                return True
            if not self.stop_texts:
                return False
            if id(text) not in scans:
                scans[id(text)] = StopScan(self.stop_automaton)
            scan = scans[id(text)]
            # An incomplete character at the end is left out, since the next token may complete it.
            scan.read(added_text(tokenizer, text.tokens, text.start).rstrip(REPLACEMENT_CHARACTER))
            return scan.found is not None

        return stops

    def banned(self, last: int) -> Sequence[int]:
        """Return the tokens that must not follow this one."""
        return [banned for before, banned in self.banned_after if last == before]
