"""Parse requests and build replies of OpenAI's chat completions API.

The reference is https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.inference.texts import Predictor
from megatron.serving.completion_text import CompletionText
from megatron.serving.fields import Fields, RequestError
from megatron.serving.openai_api import count_usage
from megatron.serving.openai_fields import COMMON, NEUTRAL, OpenAIRequest, check_names, read_sampling, read_stops, read_stream
from megatron.serving.task import MAX_PROMPTS, GenerationTask

MAX_ALTERNATIVES = 20
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TEXTS = ("name", "tool_call_id", "reasoning_content")  # further fields of a message, whose values are strings
EMPTY = ("refusal", "annotations", "audio", "function_call")  # fields of replies that clients send back; accepted if empty
NOT_OFFERED: tuple[tuple[str, Any], ...] = (
    *NEUTRAL,
    ("tools", []),
    ("tool_choice", "none"),
    ("functions", []),
    ("function_call", "none"),
    ("response_format", {"type": "text"}),
    ("modalities", ["text"]),
    ("store", False),
)
LIMITS = ("max_completion_tokens", "max_tokens")
KNOWN = COMMON | {"messages", "logprobs", "top_logprobs", "metadata", *LIMITS} | {name for name, _ in NOT_OFFERED}


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages for the chat template, each content as text; RequestError for an invalid message."""
    given = fields.values.get("messages")
    if not isinstance(given, list) or not given:
        raise RequestError("messages must be given, as a list of objects with role and content", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    """Return one message for the chat template. `where` is its path for error messages: `messages[0]`."""
    if not isinstance(given, dict):
        raise RequestError(f"{where} must be an object with role and content", "messages")
    message = {name: value for name, value in given.items() if value is not None and not (name in EMPTY and not value)}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", "messages")
    for name, value in message.items():
        if name in TEXTS and not isinstance(value, str):
            raise RequestError(f"{where}.{name} must be a string", "messages")
        if name not in ("role", "content", "tool_calls", *TEXTS):
            raise RequestError(f"{where}.{name} is not a field of a message", "messages")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where}.tool_calls must be a list of objects", "messages")
    if "content" in message:
        message["content"] = _content(message["content"], f"{where}.content")
    elif not (role == "assistant" and calls):
        raise RequestError(f"{where}.content must be given, as a string or a list of parts of type text", "messages")
    # Some templates use the older name of `reasoning_content`.
    alias = {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
    return {**alias, **message, "role": ROLES[role]}


def _content(given: Any, where: str) -> str:
    """Return the content as text: a string unchanged, or the texts of a list of parts, joined by newlines."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise RequestError(f"{where} must be a string or a list of parts of type text", "messages")
    for i, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f'{where}[{i}] must be a part such as {{"type": "text", "text": "..."}}', "messages")
    return "\n".join(part["text"] for part in given)


class ChatRequest(OpenAIRequest):
    """A request for replies to a conversation."""

    @classmethod
    def check(cls, fields: Fields, model: str) -> None:
        """Raise RequestError for an unsupported field; called before the messages are rendered, which is slow."""
        check_names(fields, KNOWN, NOT_OFFERED, model)
        if not isinstance(fields.values.get("metadata", {}), dict):
            raise RequestError("metadata must be an object", "metadata")

    @classmethod
    def from_fields(
        cls,
        fields: Fields,
        prompt: tuple[int, ...],
        served: Predictor,
        *,
        model: str,
        ends: Sequence[int],
        max_tokens_total: int,
    ) -> ChatRequest:
        """Parse a request; RequestError for the first invalid field.

        Args:
            fields: the fields of the request.
            prompt: the tokens of the rendered messages.
            served: the model; its sequence length limits a reply if the request does not.
            model: the name by which clients know the model.
            ends: ids of the tokens that end a reply.
            max_tokens_total: maximum number of tokens of a request, prompts and replies together.
        """
        samples = fields.integer("n", 1, 1, MAX_PROMPTS)
        (stream, usage), (sampling, seed) = read_stream(fields), read_sampling(fields)
        task = GenerationTask(
            prompts=(prompt,) * samples,
            max_new_tokens=_length(fields, prompt, served, max_tokens_total // samples),
            sampling=sampling,
            seed=seed,
            top=_alternatives(fields),
            stop_runs=tuple((end,) for end in ends),
            stop_texts=read_stops(fields),
        )
        return cls(task, samples, stream, usage, model, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()))

    def full_reply(self, completions: Sequence[CompletionText]) -> dict[str, Any]:
        """Return the reply's body if it is not streamed."""
        choices = []
        for i, completion in enumerate(completions):
            text, log_probs = completion.show()
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {
                "index": i,
                "message": message,
                "logprobs": _log_probs(log_probs),
                "finish_reason": completion.end or None,
            }
            choices.append(choice)
        return self._body("chat.completion", choices, usage=count_usage(completions, self.samples))

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks of a stream that precede the first text."""
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self.samples)]

    def chunks(self, index: int, completion: CompletionText) -> list[dict[str, Any]]:
        """Return the chunks of a stream with the new part of a completion; the reason of its end is a separate chunk."""
        text, log_probs = completion.show()
        chunks = []
        if text or (log_probs and log_probs["tokens"]):
            chunks.append(self._chunk(index, {"content": text}, log_probs=_log_probs(log_probs)))
        if completion.end:
            chunks.append(self._chunk(index, {}, end=completion.end))
        return chunks

    def last_chunks(self, completions: Sequence[CompletionText]) -> list[dict[str, Any]]:
        """Return the chunks of a stream that follow the last text: the token counts, if requested."""
        return [self._body("chat.completion.chunk", [], usage=count_usage(completions, self.samples))] if self.usage else []

    def _chunk(
        self, index: int, delta: Mapping[str, str], *, log_probs: dict[str, Any] | None = None, end: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": end}
        return self._body("chat.completion.chunk", [choice], **({"usage": None} if self.usage else {}))

    def _body(self, kind: str, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        header = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**header, "choices": choices, **usage}


def _length(fields: Fields, prompt: Sequence[int], served: Predictor, max_tokens_total: int) -> int:
    """Return the maximum number of tokens of a reply: as requested, or else as many as the model and the server allow."""
    requested = {name: fields.integer(name, 1, 1) for name in LIMITS if name in fields.values}
    if len(set(requested.values())) > 1:
        raise RequestError("max_tokens is the older name of max_completion_tokens, and they differ: give one", "max_tokens")
    if requested:
        return next(iter(requested.values()))
    longest = served.config.max_position_embeddings  # the training length, for rotary positions as well
    if longest is not None and longest > len(prompt):
        max_tokens_total = min(max_tokens_total, longest)
    return max(1, max_tokens_total - len(prompt))


def _alternatives(fields: Fields) -> int | None:
    """Return the number of alternatives per token in the reply; None if it has no log-probabilities."""
    with_log_probs, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, 0, MAX_ALTERNATIVES)
    if "top_logprobs" in fields.values and not with_log_probs:
        raise RequestError("top_logprobs needs logprobs true", "top_logprobs")
    return top if with_log_probs else None


def _log_probs(columns: dict[str, list[Any]] | None) -> dict[str, Any] | None:
    """Convert log-probabilities from the form of the completions API to that of the chat API."""
    if columns is None:
        return None

    def entry(token: str, log_prob: float | None) -> dict[str, Any]:
        return {"token": token, "logprob": log_prob, "bytes": list(token.encode())}

    rows = zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True)
    content = [
        {**entry(token, own), "top_logprobs": [entry(*best) for best in sorted((top or {}).items(), key=lambda e: -e[1])]}
        for token, own, top in rows
    ]
    return {"content": content, "refusal": None}
