"""Requests and replies in the form of OpenAI's completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.serving.fields import Fields, RequestError
from megatron.serving.openai_fields import COMMON, NEUTRAL, Asked, check_names, read_sampling, read_stops, read_stream
from megatron.serving.record import Record
from megatron.serving.task import MOST_PROMPTS, Task

MOST_ALTERNATIVES = 100
NOT_OFFERED = (*NEUTRAL, ("suffix", ""))
KNOWN = COMMON | {"prompt", "best_of", "max_tokens", "logprobs", "echo"} | {name for name, _ in NOT_OFFERED}


class Completion(Asked):
    """A request for completions."""

    @classmethod
    def of(cls, fields: Fields, tokenizer: Tokenizer, model: str, ends: Sequence[int]) -> Completion:
        """Read a request; RequestError for the first field that is wrong.

        Args:
            fields: the request.
            tokenizer: of the model.
            model: the name of the one that is served.
            ends: tokens that end a text.

        Returns:
            What is asked for.
        """
        check_names(fields, KNOWN, NOT_OFFERED, model)
        samples = fields.whole("n", 1, 1, MOST_PROMPTS)
        if fields.whole("best_of", samples, 1) != samples:
            raise RequestError("best_of is not offered: leave it out, n gives as many texts", "best_of")
        prompts = [prompt for prompt in _prompts(fields, tokenizer) for _ in range(samples)]
        if len(prompts) > MOST_PROMPTS:
            raise RequestError(f"{len(prompts)} texts are asked for; legal: up to {MOST_PROMPTS}", "prompt")
        echo, (stream, usage), (sampling, seed) = fields.truth("echo"), read_stream(fields), read_sampling(fields)
        task = Task(
            prompts=tuple(prompts),
            max_new_tokens=fields.whole("max_tokens", 16, 0 if echo else 1),
            sampling=sampling,
            seed=seed,
            top=fields.whole("logprobs", 0, 0, MOST_ALTERNATIVES) if "logprobs" in fields.held else None,
            stop_runs=tuple((end,) for end in ends),
            stop_texts=read_stops(fields),
        )
        return cls(task, samples, stream, usage, model, f"cmpl-{secrets.token_hex(12)}", int(time.time()), echo)

    def whole(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the reply to a request that is no stream."""
        choices = [told for i, record in enumerate(records) for told in self._told(i, record)]
        return self._body(choices, usage=count(records, self.samples))

    def first_pieces(self) -> list[dict[str, Any]]:
        """Return the pieces of a stream that stand before all text."""
        return []

    def pieces(self, index: int, record: Record) -> list[dict[str, Any]]:
        """Return the pieces of a stream about what of a text has not been told yet."""
        return [self._body([told], **self._no_usage()) for told in self._told(index, record)]

    def last_pieces(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Return the pieces of a stream that stand behind all text."""
        return [self._body([], usage=count(records, self.samples))] if self.usage else []

    def _no_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.usage else {}

    def _body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        about = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**about, "choices": choices, **more}

    def _told(self, index: int, record: Record) -> list[dict[str, Any]]:
        text, log_probs = record.show()
        if not text and not record.end and not (log_probs and log_probs["tokens"]):
            return []
        return [{"text": text, "index": index, "logprobs": log_probs, "finish_reason": record.end or None}]


def count(records: Sequence[Record], samples: int) -> dict[str, int]:
    """Return the usage: every prompt counts once, also where it gets several texts."""
    prompts, written = sum(r.start for r in records[::samples]), sum(r.written for r in records)
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


def _prompts(fields: Fields, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A string, token ids, or a list of either."""
    given = fields.held.get("prompt")
    several = isinstance(given, list) and all(isinstance(prompt, str | list) for prompt in given)
    prompts = given if isinstance(given, list) and several else [given]
    if not prompts:
        raise RequestError("prompt is empty", "prompt")
    return [_tokens(prompt, tokenizer) for prompt in prompts]


def _tokens(prompt: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    if isinstance(prompt, str):
        try:
            return tuple(tokenizer.tokenize(prompt))
        except DataError as error:
            raise RequestError(str(error), "prompt") from error
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise RequestError("prompt must be given, as a string, a list of strings, token ids, or a list of lists of these", "prompt")
