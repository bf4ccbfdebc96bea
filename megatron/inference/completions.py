"""Texts that a trained model writes after prompts: from strings to strings, sampled or searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron.data.tokenizer import Tokenizer
from megatron.inference.beam_search import BeamSearch
from megatron.inference.generate import extend_texts
from megatron.inference.pipeline import Pipeline
from megatron.inference.restore import OpenedModel, text_tokenizer
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText, check_prompt, free_positions
from megatron.model.transformer import Transformer


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, and the text that begins with it.

    Attributes:
        prompt: as it was given.
        text: the prompt and what the model wrote after it, without the token that ended it.
        end: "stop" after the token that ends a text, "length" after as many tokens as were allowed.
        score: of a beam search: the mean log-probability of a written token, under its length penalty.
        prompt_tokens: number of tokens of the prompt.
        positions_left: number of tokens that the model's positions allowed, where that cut the text short.
    """

    prompt: str
    text: str
    end: str
    score: float | None
    prompt_tokens: int
    positions_left: int | None


class Limits(NamedTuple):
    """Largest number of tokens to write, prompts that are continued together, and whether keys and values are kept."""

    max_new_tokens: int
    micro_batch_size: int
    use_cache: bool


class Written(NamedTuple):
    """Token ids of a prompt and of what follows it, why it ended, and the score of a beam search."""

    tokens: list[int]
    end: str
    score: float | None = None


def choose_decoding(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    beam_width: int | None = None,
    length_penalty: float | None = None,
) -> Sampling | BeamSearch:
    """Return the rule by which tokens are chosen.

    Args:
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0 is all.
        top_p: only the fewest tokens of this probability; 0 is all.
        beam_width: continuations that a beam search follows at once; None to sample.
        length_penalty: of a beam search: above 1 for long texts; 1 by default.

    Raises:
        ValueError: a value makes no sense, or does not go with the others.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if beam_width is None:
        if length_penalty is not None:
            raise ValueError("--length-penalty belongs to a beam search: give --beam-width")
        return sampling
    if sampling != Sampling():
        raise ValueError("--beam-width chooses nothing at random: leave --temperature, --top-k and --top-p out")
    return BeamSearch(beam_width, 1.0 if length_penalty is None else length_penalty)


def check_limits(max_new_tokens: int, micro_batch_size: int) -> None:
    """Raise ValueError where no token may be written, or no prompt be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} writes nothing; legal: 1 and above")
    if micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size {micro_batch_size} takes no prompt; legal: 1 and above")


def generate(
    opened: OpenedModel[Transformer] | OpenedModel[Pipeline],
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    beam_width: int | None = None,
    length_penalty: float | None = None,
    stop_token: int | None = None,
    seed: int = 0,
    micro_batch_size: int = 32,
    use_cache: bool = True,
) -> list[PromptCompletion]:
    """Write a text after each prompt. Collective, where the model is cut over several ranks.

    Args:
        opened: a GPT with its tokenizer, as `open_model` reads it from a checkpoint.
        prompts: one text, or several.
        max_new_tokens: most tokens to write after each prompt; fewer where the model's positions end before.
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0 is all.
        top_p: only the fewest tokens of this probability; 0 is all.
        beam_width: continuations that a beam search follows at once; None to sample.
        length_penalty: of a beam search: above 1 for long texts; 1 by default.
        stop_token: id of the token that ends a text; that of the tokenizer by default.
        seed: random choices follow from it and from the number of the prompt.
        micro_batch_size: prompts that are continued together.
        use_cache: keep keys and values of the tokens before; without, they are computed again for each token.

    Returns:
        A completion for each prompt, in their order.

    Raises:
        ValueError: a setting makes no sense, or a prompt cannot be continued.
        DataError: the model is a BERT, or its checkpoint holds no tokenizer.
    """
    decoding = choose_decoding(temperature, top_k, top_p, beam_width, length_penalty)
    check_limits(max_new_tokens, micro_batch_size)
    tokenizer = text_tokenizer(opened)
    model = opened.model if isinstance(opened.model, Pipeline) else Pipeline.alone(opened.model)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    stop = _stop_token(stop_token, tokenizer, opened.config.known_vocab_size)
    rows = _tokenize(model, tokenizer, prompts)
    limits = Limits(max_new_tokens, micro_batch_size, use_cache)
    if isinstance(decoding, BeamSearch):
        found = _search(model, rows, replace(decoding, stop=stop), limits)
    else:
        found = _sample(model, rows, decoding, limits, seed, stop)
    return [
        _complete(model, tokenizer, prompt, row, written, max_new_tokens)
        for prompt, row, written in zip(prompts, rows, found, strict=True)
    ]


def _stop_token(given: int | None, tokenizer: Tokenizer, vocabulary: int) -> int | None:
    """Return the token that ends a text; ValueError for one that the model does not have."""
    if given is not None and not 0 <= given < vocabulary:
        raise ValueError(f"--stop-token {given} is outside of the vocabulary of {vocabulary}")
    return tokenizer.special.get("eod") if given is None else given


def _tokenize(model: Pipeline, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of every prompt. ValueError for one that cannot be continued, before the first takes its time."""
    rows = [tokenizer.tokenize(prompt) for prompt in prompts]
    for number, row in enumerate(rows, 1):
        try:
            check_prompt(model, row)
        except ValueError as error:
            raise ValueError(f"prompt {number} of {len(prompts)}: {error}") from error
    return rows


def _search(model: Pipeline, rows: Sequence[list[int]], search: BeamSearch, limits: Limits) -> list[Written]:
    """Return the best beam of each prompt."""
    found = []
    for row in rows:
        *_, beams = search.run(model, row, max_new_tokens=limits.max_new_tokens, use_cache=limits.use_cache)
        found.append(Written([*row, *beams[0].tokens], beams[0].end, beams[0].score))
    return found


def _sample(
    model: Pipeline, rows: Sequence[list[int]], sampling: Sampling, limits: Limits, seed: int, stop: int | None
) -> list[Written]:
    """Return a text after each prompt, several of them at a time."""
    texts = [GeneratedText.from_prompt(row) for row in rows]

    def stops(text: GeneratedText) -> bool:
        return text.tokens[-1] == stop

    for first in range(0, len(texts), limits.micro_batch_size):
        passes = extend_texts(
            model,
            texts[first : first + limits.micro_batch_size],
            max_new_tokens=limits.max_new_tokens,
            sampling=sampling,
            seed=seed,
            first=first,
            stops=stops,
            use_cache=limits.use_cache,
        )
        for _ in passes:
            pass
    return [Written(text.tokens, text.end) for text in texts]


def _complete(
    model: Pipeline, tokenizer: Tokenizer, prompt: str, row: list[int], written: Written, max_new_tokens: int
) -> PromptCompletion:
    tokens = written.tokens[:-1] if written.end == "stop" else written.tokens
    room = free_positions(model, row)
    cut = room is not None and written.end == "length" and len(written.tokens) - len(row) == room < max_new_tokens
    return PromptCompletion(prompt, tokenizer.detokenize(tokens), written.end, written.score, len(row), room if cut else None)
