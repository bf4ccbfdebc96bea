"""Requests and replies in the form of OpenAI's completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.generate import Sampling
from megatron.serving.fields import Fields, RequestError
from megatron.serving.record import Record
from megatron.serving.task import MOST_PROMPTS, Task

MOST_STOPS, LONGEST_STOP, MOST_ALTERNATIVES = 4, 1000, 100  # LONGEST_STOP: characters
NEUTRAL: tuple[tuple[str, Any], ...] = (
    ("frequency_penalty", 0),
    ("presence_penalty", 0),
    ("logit_bias", {}),
    ("suffix", ""),
)  # what is not offered
HOW = ("temperature", "top_p", "top_k", "n", "best_of", "max_tokens", "stop", "seed")
REPLY = ("stream", "stream_options", "logprobs", "echo")
KNOWN = frozenset(("model", "prompt", "user", *HOW, *REPLY, *(name for name, _ in NEUTRAL)))


@dataclass(frozen=True)
class Completion:
    """A request: the task, and how it is answered.

    samples: texts for each prompt. usage: a last piece of a stream tells the number of tokens.
    """

    task: Task
    samples: int
    echo: bool
    stream: bool
    usage: bool
    model: str
    id: str
    created: int

    @classmethod
    def of(cls, fields: Fields, tokenizer: Tokenizer, model: str) -> Completion:
        """RequestError for the first field that is wrong. model: the name of the one that is served."""
        fields.only(KNOWN)
        asked = fields.held.get("model", model)
        if asked != model:
            raise RequestError(f"the model {asked!r} is not here; there is {model!r}", "model", 404, "model_not_found")
        for name, neutral in NEUTRAL:
            if fields.held.get(name, neutral) != neutral:
                raise RequestError(f"{name} is not offered: leave it out", name)
        samples = fields.whole("n", 1, 1, MOST_PROMPTS)
        if fields.whole("best_of", samples, 1) != samples:
            raise RequestError("best_of is not offered: leave it out, n gives as many texts", "best_of")
        prompts = [prompt for prompt in _prompts(fields, tokenizer) for _ in range(samples)]
        if len(prompts) > MOST_PROMPTS:
            raise RequestError(f"{len(prompts)} texts are asked for; legal: up to {MOST_PROMPTS}", "prompt")
        echo = fields.truth("echo")
        options = fields.held.get("stream_options", {})
        if not isinstance(options, dict) or not isinstance(usage := options.get("include_usage", False), bool):
            raise RequestError('stream_options must be an object such as {"include_usage": true}', "stream_options")
        top_p = fields.number("top_p", 1.0, 0.0, 1.0, above=True)
        task = Task(
            prompts=tuple(prompts),
            max_new_tokens=fields.whole("max_tokens", 16, 0 if echo else 1),
            sampling=Sampling(fields.number("temperature", 1.0, 0.0, 100.0), fields.whole("top_k", 0, 0, 1_000_000), top_p),
            seed=fields.whole("seed", secrets.randbits(62), -(2**63), 2**63 - 1),
            top=fields.whole("logprobs", 0, 0, MOST_ALTERNATIVES) if "logprobs" in fields.held else None,
            stop_runs=((tokenizer.special["eod"],),) if "eod" in tokenizer.special else (),
            stop_texts=_stop_texts(fields),
        )
        name = f"cmpl-{secrets.token_hex(12)}"
        return cls(task, samples, echo, fields.truth("stream"), usage, model, name, int(time.time()))

    def body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A whole reply, or a piece of a stream."""
        about = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**about, "choices": choices, **more}

    def count(self, records: Sequence[Record]) -> dict[str, int]:
        """The usage: every prompt counts once, also where it gets several texts."""
        prompts, written = sum(r.start for r in records[:: self.samples]), sum(r.written for r in records)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


def choice(index: int, record: Record) -> dict[str, Any] | None:
    """What of a text has not been told yet; None for nothing."""
    text, log_probs = record.show()
    if not text and not record.end and not (log_probs and log_probs["tokens"]):
        return None
    return {"text": text, "index": index, "logprobs": log_probs, "finish_reason": record.end or None}


def error_body(error: RequestError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def models(model: str, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": model, "object": "model", "created": created, "owned_by": "megatron"}]}


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


def _stop_texts(fields: Fields) -> tuple[str, ...]:
    given = fields.held.get("stop", [])
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > MOST_STOPS:
        raise RequestError(f"stop must be a string or a list of up to {MOST_STOPS} strings, none of them empty", "stop")
    if longest := [len(stop) for stop in stops if len(stop) > LONGEST_STOP]:
        raise RequestError(f"a stop text has {longest[0]} characters; legal: up to {LONGEST_STOP}", "stop")
    return tuple(stops)
