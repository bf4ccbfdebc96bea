"""Compute what lm-evaluation-harness requests: likelihoods of texts, and generated text; does not import its package.

Tokens and windows are those of the harness's Hugging Face model, so that a checkpoint and its export get equal figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.inference.generate import generate_tokens
from megatron.inference.sampling import Sampling
from megatron.inference.texts import Predictor
from megatron.mesh.mesh import Axis
from megatron.tasks.scoring import ScoringModel, WindowScore, check_finite, check_vocabulary, score_windows
from megatron.tasks.windows import Window, split_windows


class LikelihoodModel(ScoringModel, Predictor, Protocol):
    """A whole model that scores texts and continues them."""


@dataclass(frozen=True)
class Likelihoods:
    """A model and its tokenizer, for the requests of the harness.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        seq_length: tokens that the model reads at once.
        micro_batch_size: number of windows in one forward pass.
        single: the data-parallel axis, of one rank.
    """

    model: LikelihoodModel
    tokenizer: Tokenizer
    seq_length: int
    micro_batch_size: int
    single: Axis = field(default_factory=lambda: Axis.alone("dp"))

    def score_continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        A context that is too long is cut at its beginning; an empty one is replaced by the start token.

        Returns:
            For each (context, continuation), the continuation's log-probability, and whether it is the most probable one.

        Raises:
            DataError: a continuation has no token, or more than the model reads at once.
        """
        found = []
        for context, continuation in pairs:
            before, after = self.tokenize_pair(context, continuation)
            if not 1 <= len(after) <= self.seq_length:
                raise DataError(
                    f"the continuation {quote_start(continuation)} has {len(after)} tokens; it must have 1 to "
                    f"{self.seq_length}, what the model sees at once"
                )
            found.append(Window([*before, *after][-self.seq_length - 1 :], len(after)))
        return [(one.log_probability, one.hit) for one in self._scores(found)]

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Return each text's log-probability after the start token; long texts are scored in windows, every token once."""
        owner: list[int] = []
        found: list[Window] = []
        for number, text in enumerate(texts):
            cut = list(split_windows([self.start, *self.tokenizer.tokenize(text)], self.seq_length, self.seq_length, full=True))
            found += cut
            owner += [number] * len(cut)
        sums = [0.0] * len(texts)  # the log-probability of a text is the sum over its windows
        for number, one in zip(owner, self._scores(found), strict=True):
            sums[number] += one.log_probability
        return sums

    def generate_until(self, prompt: str, stops: Sequence[str], max_tokens: int, sampling: Sampling, seed: int = 0) -> str:
        """Return the text that the model generates after a prompt, up to and without the first of the stop strings.

        Args:
            prompt: the prompt; it is cut at its beginning if it leaves no room for `max_tokens`.
            stops: strings that end the text.
            max_tokens: maximum number of generated tokens.
            sampling: the rule by which tokens are chosen.
            seed: seed of the sampling.

        Raises:
            DataError: `max_tokens` leaves no room for any prompt.
        """
        room = self.seq_length - max_tokens
        if room < 1:
            raise DataError(
                f"{max_tokens} tokens to write leave no room for a prompt in the {self.seq_length} that the model sees at "
                "once; set max_gen_toks in the task's generation_kwargs, or with --gen_kwargs"
            )
        tokens = (self.tokenizer.tokenize(prompt) or [self.start])[-room:]
        check_vocabulary(tokens, self.model.config.known_vocab_size, f"the prompt {quote_start(prompt)}")
        written: list[int] = []
        text, stop = "", self.tokenizer.special.get("eod")
        for token in generate_tokens(self.model, tokens, max_new_tokens=max_tokens, sampling=sampling, seed=seed, stop=stop):
            written.append(token)
            text = self.tokenizer.detokenize(written)  # of all tokens: one alone may be part of a character
            if ends := [text.index(end) for end in stops if end and end in text]:
                return text[: min(ends)]
        return text

    @property
    def start(self) -> int:
        """The token before a text without a context: the begin-of-text token, else the end-of-document token."""
        return self.tokenizer.token("bos" if "bos" in self.tokenizer.special else "eod")

    def tokenize_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return context and continuation in tokens.

        They are tokenised together, since a tokenizer can merge characters of both, and split where the context ends. Spaces at
        the context's end go to the continuation.
        """
        # " a" is one token in most vocabularies, while "a" after a token of spaces hardly ever occurs in training.
        bare = context.rstrip()
        if not bare:
            return [self.start], self.tokenizer.tokenize(context + continuation)
        before = self.tokenizer.tokenize(bare)
        both = self.tokenizer.tokenize(context + continuation)
        return both[: len(before)], both[len(before) :]

    def _scores(self, found: Sequence[Window]) -> list[WindowScore]:
        """Return the scores in the order of the windows.

        The longest are computed first, so that the windows of a micro-batch have similar lengths, and a lack of memory shows
        early.
        """
        vocabulary = self.model.config.known_vocab_size
        for window in found:
            check_vocabulary(window.tokens, vocabulary, "the text")
        order = sorted(range(len(found)), key=lambda number: -len(found[number].tokens))
        made = score_windows(self.model, (found[number] for number in order), self.micro_batch_size, self.single)
        by_number = dict(zip(order, made, strict=True))
        check_finite(sum(one.log_probability for one in by_number.values()), "the checkpoint")
        return [by_number[number] for number in range(len(found))]


def quote_start(text: str) -> str:
    """Return the beginning of a text in quotes, for a message."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
