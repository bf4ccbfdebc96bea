"""Parse the fields that OpenAI's completions and chat APIs share, and describe the model in OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron.inference.sampling import Sampling
from megatron.serving.fields import Fields, RequestError
from megatron.serving.task import GenerationTask

MAX_STOP_CHARACTERS = 65_536  # total length of the stop texts of a request
SAMPLING = ("temperature", "top_p", "top_k", "seed", "stop")
COMMON = frozenset(("model", "user", "n", "stream", "stream_options", *SAMPLING))
NEUTRAL: tuple[tuple[str, Any], ...] = (("frequency_penalty", 0), ("presence_penalty", 0), ("logit_bias", {}))


@dataclass(frozen=True)
class OpenAIRequest:
    """A request: the task, and the settings of its reply.

    Attributes:
        task: the task for the engine.
        samples: number of completions of each prompt.
        stream: the reply is streamed.
        usage: the last chunk of a stream contains the token counts.
        model: the name by which clients know the model.
        id: id of the reply.
        created: time of the request, in seconds since 1970.
        echo: the reply begins with the prompt.
    """

    task: GenerationTask
    samples: int
    stream: bool
    usage: bool
    model: str
    id: str
    created: int
    echo: bool = False


def check_names(fields: Fields, known: Iterable[str], neutral: Iterable[tuple[str, Any]], model: str) -> None:
    """Raise RequestError for an unknown or unsupported field, or for another model than the served one.

    Args:
        fields: the fields of the request.
        known: names of all known fields.
        neutral: unsupported fields, each with the one accepted value, which has no effect.
        model: the name of the served model.
    """
    fields.only(frozenset(known))
    requested = fields.values.get("model", model)
    if requested != model:
        raise no_model(requested, model)
    for name, value in neutral:
        actual = fields.values.get(name, value)
        # False equals 0 in Python, but is not a number in JSON.
        if actual != value or isinstance(actual, bool) is not isinstance(value, bool):
            raise RequestError(f"{name} is not offered: leave it out", name)
    if not isinstance(fields.values.get("user", ""), str):
        raise RequestError("user must be a string", "user")


def no_model(requested: object, model: str) -> RequestError:
    """Return the error for a request for another model than `model`."""
    return RequestError(f"the model {requested!r} does not exist; this server has {model!r}", "model", 404, "model_not_found")


def read_sampling(fields: Fields) -> tuple[Sampling, int]:
    """Return the sampling settings and the seed."""
    temperature, top_k = fields.number("temperature", 1.0, 0.0, 100.0), fields.integer("top_k", 0, 0, 1_000_000)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0, above=True)
    return Sampling(temperature, top_k, top_p), fields.integer("seed", secrets.randbits(62), -(2**63), 2**63 - 1)


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Return whether the reply is streamed, and whether its last chunk contains the token counts."""
    stream, options = fields.boolean("stream"), fields.values.get("stream_options")
    if options is None:
        return stream, False
    if not isinstance(options, dict) or not isinstance(usage := options.get("include_usage") or False, bool):
        raise RequestError('stream_options must be an object such as {"include_usage": true}', "stream_options")
    if unknown := sorted(options.keys() - {"include_usage"}):
        raise RequestError(f"stream_options.{unknown[0]} is not offered: leave it out", "stream_options")
    if not stream:
        raise RequestError("stream_options applies only to streams: set stream to true, or leave it out", "stream_options")
    return stream, usage


def read_stops(fields: Fields) -> tuple[str, ...]:
    """Return the stop texts, which end a reply."""
    value = fields.values.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError("stop must be a string or a list of strings, none of them empty", "stop")
    if (characters := sum(map(len, stops))) > MAX_STOP_CHARACTERS:
        raise RequestError(f"stop has {characters} characters in total; legal: up to {MAX_STOP_CHARACTERS}", "stop")
    return tuple(dict.fromkeys(stops))


def model_body(model: str, created: int) -> dict[str, Any]:
    """Return the description of a model in OpenAI's form. `created` is in seconds since 1970."""
    return {"id": model, "object": "model", "created": created, "owned_by": "megatron"}
