"""Parse requests `PUT /api` with Megatron-LM's fields, limits and defaults, and build their replies."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from megatron.data.tokenizer import Tokenizer
from megatron.inference.beam_search import MAX_BEAM_WIDTH, MAX_LENGTH_PENALTY, BeamSearch
from megatron.inference.sampling import Sampling
from megatron.serving.completion_text import CompletionText
from megatron.serving.detokenize import token_text
from megatron.serving.fields import Fields, RequestError
from megatron.serving.task import MAX_PROMPTS, GenerationTask
from megatron.serving.waiting import TaskResult

# Old and current names of fields; like Megatron-LM's server, this one refuses the old names.
RENAMED = (("max_len", "tokens_to_generate"), ("sentences", "prompts"))
SAMPLING = ("temperature", "top_k", "top_p", "top_p_decay", "top_p_bound", "random_seed")
STOPS = ("stop_on_double_eol", "stop_on_eol", "prevent_newline_after_colon")
BEAMS = ("beam_width", "stop_token", "length_penalty")
KNOWN = frozenset(("prompts", "tokens_to_generate", "logprobs", "add_BOS", "no_log", *SAMPLING, *STOPS, *BEAMS))


def read_task(fields: Fields, tokenizer: Tokenizer) -> GenerationTask:
    """Return the task of a request; RequestError for the first invalid field."""
    for old, new in RENAMED:
        if old in fields.values:
            raise RequestError(f"{old} is no longer a field: use {new}", old)
    fields.only(KNOWN)
    prompts = _prompts(fields, fields.boolean("add_BOS"), tokenizer)
    count = fields.integer("tokens_to_generate", 64, 0)
    logprobs = fields.boolean("logprobs")
    if count == 0 and not logprobs:
        raise RequestError("tokens_to_generate 0 only makes sense with logprobs true", "tokens_to_generate")
    fields.boolean("no_log")
    return GenerationTask(
        prompts=prompts,
        max_new_tokens=count,
        sampling=_sampling(fields),
        seed=fields.integer("random_seed", secrets.randbits(62), 0),
        top=0 if logprobs else None,
        stop_runs=_stop_runs(fields, tokenizer),
        banned_after=_banned_after(fields, tokenizer),
        beam=_beam(fields, tokenizer, len(prompts), count),
    )


def _prompts(fields: Fields, begin: bool, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the prompts as tokens. `begin` puts the end-of-document token before each, as between documents in training."""
    prompts = fields.values.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("prompts must be given, as a list of strings", "prompts")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"there are {len(prompts)} prompts; legal: 1 to {MAX_PROMPTS}", "prompts")
    if "" in prompts and not begin:
        raise RequestError("an empty prompt needs add_BOS true", "prompts")
    return tuple((*([tokenizer.eod] if begin else []), *tokenizer.tokenize(prompt)) for prompt in prompts)


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0.0, 100.0, above=True)
    top_k, top_p = fields.integer("top_k", 0, 0, 1000), fields.number("top_p", 0.0, 0.0, 1.0)
    if top_k > 0 and top_p > 0.0:
        raise RequestError("top_k and top_p exclude each other", "top_p")
    for name in ("top_p_decay", "top_p_bound"):
        if name in fields.values and top_p == 0.0:
            raise RequestError(f"{name} needs top_p", name)
    decay = fields.number("top_p_decay", 0.0, 0.0, 1.0)
    bound = fields.number("top_p_bound", 0.0, 0.0, top_p, above="top_p_bound" in fields.values)
    return Sampling(temperature, top_k, top_p, decay, bound)


def _beam(fields: Fields, tokenizer: Tokenizer, prompts: int, count: int) -> BeamSearch | None:
    stop = fields.integer("stop_token", tokenizer.special.get("eod", -1), -1)
    penalty = fields.number("length_penalty", 1.0, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
    if "beam_width" not in fields.values:
        return None
    width = fields.integer("beam_width", 1, 1, MAX_BEAM_WIDTH)
    if prompts > 1:
        raise RequestError(f"beam_width is for one prompt, there are {prompts}", "beam_width")
    if count == 0:
        raise RequestError("tokens_to_generate 0 leaves nothing for beam_width to search", "tokens_to_generate")
    return BeamSearch(width, penalty, None if stop < 0 else stop)


def _stop_runs(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences that end a text: the end-of-document token and, if requested, a line or paragraph break."""
    runs: list[tuple[int, ...]] = [(tokenizer.special["eod"],)] if "eod" in tokenizer.special else []
    line, double = fields.boolean("stop_on_eol"), fields.boolean("stop_on_double_eol")
    if line or double:
        newline, paragraph = _tokenize_inside("\n", tokenizer), _tokenize_inside("\n\n", tokenizer)
        # Some tokenizers have a token for two newlines, others use the newline token twice.
        runs += [paragraph, newline] if line else [paragraph, newline * 2]
    return tuple(dict.fromkeys(run for run in runs if run))


def _tokenize_inside(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens of a text that follows another one, without the space that some tokenizers add at the beginning."""
    # These are the tokens of "x" + text without those of "x".
    before, whole = tokenizer.tokenize("x"), tokenizer.tokenize("x" + text)
    return tuple(whole[len(before) :] if whole[: len(before)] == before else tokenizer.tokenize(text))


def _banned_after(fields: Fields, tokenizer: Tokenizer) -> tuple[tuple[int, int], ...]:
    """Return the pair of colon and newline, if the request forbids a newline after a colon."""
    if not fields.boolean("prevent_newline_after_colon"):
        return ()
    colon, newline = _tokenize_inside(":", tokenizer), _tokenize_inside("\n", tokenizer)
    return ((colon[-1], newline[0]),) if colon and newline else ()


def reply(
    task: GenerationTask, completions: Sequence[CompletionText], done: TaskResult, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the reply: text, segments and logprobs of every prompt with its completion; for a beam search, of each beam.

    Args:
        task: the task of the request.
        completions: the complete texts.
        done: the task's result.
        tokenizer: the model's tokenizer.
    """
    if task.beam is not None:
        rows = [[*task.prompts[0], *beam.tokens] for beam in done.beams]
        body: dict[str, Any] = {"scores": [beam.score for beam in done.beams]}
    else:
        rows = [completion.tokens for completion in completions]
        scored = [[score.log_prob for score in completion.scores] for completion in completions]
        body = {"logprobs": None if task.top is None else scored}
    segments = [[token_text(tokenizer, token) for token in row] for row in rows]
    return {"text": [tokenizer.detokenize(row) for row in rows], "segments": segments, **body}
