"""Parse requests and build replies of OpenAI's completions API.

The reference is https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.serving.completion_text import CompletionText
from megatron.serving.fields import Fields, RequestError
from megatron.serving.openai_fields import COMMON, NEUTRAL, OpenAIRequest, check_names, read_sampling, read_stops, read_stream
from megatron.serving.task import MAX_PROMPTS, GenerationTask

MAX_LOGPROBS = 100
NOT_OFFERED = (*NEUTRAL, ("suffix", ""))
KNOWN = COMMON | {"prompt", "best_of", "max_tokens", "logprobs", "echo"} | {name for name, _ in NOT_OFFERED}


class CompletionRequest(OpenAIRequest):
    """A request for completions."""

    @classmethod
    def from_fields(cls, fields: Fields, tokenizer: Tokenizer, model: str, ends: Sequence[int]) -> CompletionRequest:
        """Parse a request.

        Args:
            fields: the fields of the request.
            tokenizer: the model's tokenizer.
            model: the name by which clients know the model.
            ends: ids of the tokens that end a text.

        Raises:
            RequestError: a field is invalid; the message names the first one.
        """
        check_names(fields, KNOWN, NOT_OFFERED, model)
        samples = fields.integer("n", 1, 1, MAX_PROMPTS)
        if fields.integer("best_of", samples, 1) != samples:
            raise RequestError("best_of is not supported: leave it out, or give it the value of n", "best_of")
        prompts = [prompt for prompt in _read_prompts(fields, tokenizer) for _ in range(samples)]
        if len(prompts) > MAX_PROMPTS:
            raise RequestError(f"the request is for {len(prompts)} texts; legal: up to {MAX_PROMPTS}", "prompt")
        echo, (stream, usage), (sampling, seed) = fields.boolean("echo"), read_stream(fields), read_sampling(fields)
        task = GenerationTask(
            prompts=tuple(prompts),
            max_new_tokens=fields.integer("max_tokens", 16, 0 if echo else 1),
            sampling=sampling,
            seed=seed,
            top=fields.integer("logprobs", 0, 0, MAX_LOGPROBS) if "logprobs" in fields.values else None,
            stop_runs=tuple((end,) for end in ends),
            stop_texts=read_stops(fields),
        )
        return cls(task, samples, stream, usage, model, f"cmpl-{secrets.token_hex(12)}", int(time.time()), echo)

    def full_reply(self, completions: Sequence[CompletionText]) -> dict[str, Any]:
        """Return the reply's body if it is not streamed."""
        choices = [choice for i, completion in enumerate(completions) for choice in self._choices(i, completion)]
        return self._body(choices, usage=count_usage(completions, self.samples))

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks of a stream that precede the first text: none in this API."""
        return []

    def chunks(self, index: int, completion: CompletionText) -> list[dict[str, Any]]:
        """Return the chunks of a stream with the new part of a completion."""
        return [self._body([choice], **self._no_usage()) for choice in self._choices(index, completion)]

    def last_chunks(self, completions: Sequence[CompletionText]) -> list[dict[str, Any]]:
        """Return the chunks of a stream that follow the last text: the token counts, if requested."""
        return [self._body([], usage=count_usage(completions, self.samples))] if self.usage else []

    def _no_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.usage else {}

    def _body(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        header = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**header, "choices": choices, **usage}

    def _choices(self, index: int, completion: CompletionText) -> list[dict[str, Any]]:
        """Return a list with the entry of `choices` for the new part of a completion; an empty list if nothing is new."""
        text, log_probs = completion.show()
        if not text and not completion.end and not (log_probs and log_probs["tokens"]):
            return []
        return [{"text": text, "index": index, "logprobs": log_probs, "finish_reason": completion.end or None}]


def count_usage(completions: Sequence[CompletionText], samples: int) -> dict[str, int]:
    """Return the reply's `usage`. The tokens of a prompt with several completions (`samples`) count once."""
    prompts, completion_tokens = sum(r.start for r in completions[::samples]), sum(r.written for r in completions)
    return {"prompt_tokens": prompts, "completion_tokens": completion_tokens, "total_tokens": prompts + completion_tokens}


def _read_prompts(fields: Fields, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt. The field is a string, a list of token ids, or a list of either."""
    value = fields.values.get("prompt")
    is_list_of_prompts = isinstance(value, list) and all(isinstance(prompt, str | list) for prompt in value)
    prompts = value if isinstance(value, list) and is_list_of_prompts else [value]
    if not prompts:
        raise RequestError("prompt is empty", "prompt")
    return [_tokenize_prompt(prompt, tokenizer) for prompt in prompts]


def _tokenize_prompt(prompt: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens of one prompt, which is a string or a list of token ids."""
    if isinstance(prompt, str):
        try:
            return tuple(tokenizer.tokenize(prompt))
        except DataError as error:
            raise RequestError(str(error), "prompt") from error
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise RequestError("prompt must be a string, a list of strings, token ids, or a list of lists of token ids", "prompt")
