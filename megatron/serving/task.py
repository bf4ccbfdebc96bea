"""Describe what a request asks of the model, in tokens and numbers: the same for both forms of requests, and for all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from megatron.data.tokenizer import Tokenizer
from megatron.inference.beam_search import BeamSearch
from megatron.inference.generate import GeneratedText, Predictor, Sampling, check_prompt, free_positions
from megatron.serving.detokenize import REPLACEMENT_CHARACTER, added_text
from megatron.serving.fields import RequestError
from megatron.serving.stops import StopScan, StopTexts

MAX_PROMPTS = 128


@dataclass(frozen=True)
class GenerationTask:
    """Prompts and how they go on.

    Attributes:
        prompts: tokens of each.
        max_new_tokens: after each prompt.
        sampling: how tokens are chosen.
        seed: of the random numbers.
        top: how many alternatives the score of a token lists; None for no scores.
        stop_runs: tokens in a row that end a text when the last of them is written.
        stop_texts: what ends a text when it appears in what is written.
        banned_after: pairs of a token and one that must not follow it.
        beam: a beam search of the only prompt instead of sampling.
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

    def to_bytes(self) -> bytes:
        """Return the task as JSON, for the other ranks."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> GenerationTask:
        """Read a task that `to_bytes` wrote."""
        held = json.loads(data)
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
        """Raise RequestError for what the model cannot do.

        Args:
            model: the model that is served.
            max_tokens_total: the most of a request, prompts and what is written together.
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
        # The cache of keys and values has a row for each text, as long as the longest.
        rows = len(self.prompts) if self.beam is None else self.beam.width
        if (tokens := rows * (len(longest) + self.max_new_tokens)) > max_tokens_total:
            raise RequestError(
                f"the request takes {tokens} tokens, this server allows {max_tokens_total} (--max-tokens-to-oom)"
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

    @cached_property
    def stop_automaton(self) -> StopTexts:
        """The automaton of the stop texts.

        Built when the first text of the task gets its first token: of tasks that wait none is in memory.
        """
        return StopTexts(self.stop_texts)

    def stops(self, tokenizer: Tokenizer) -> Callable[[GeneratedText], bool]:
        """Return a function that says whether the last token that a text of this task got ends it."""
        scans: dict[int, StopScan] = {}

        def stops(text: GeneratedText) -> bool:
            if any(tuple(text.tokens[-len(run) :]) == run for run in self.stop_runs):
                return True
            if not self.stop_texts:
                return False
            if id(text) not in scans:
                scans[id(text)] = StopScan(self.stop_automaton)
            scan = scans[id(text)]
            # What is not yet a whole character may still become another one.
            scan.read(added_text(tokenizer, text.tokens, text.start).rstrip(REPLACEMENT_CHARACTER))
            return scan.found is not None

        return stops

    def banned(self, last: int) -> Sequence[int]:
        """Return the tokens that must not follow this one."""
        return [banned for before, banned in self.banned_after if last == before]
