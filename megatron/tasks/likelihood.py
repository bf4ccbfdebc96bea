"""Answer the requests of lm-evaluation-harness, for log-probabilities and generated text, without importing its package.

Tokens and windows are those of the harness's Hugging Face model, so that a checkpoint and its export get equal results.
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
    """A model, on one rank or several, that scores texts and continues them."""


@dataclass(frozen=True)
class Likelihoods:
    """A model and its tokenizer, for the requests of the harness.

    Attributes:
        model: the model.
        tokenizer: tokenizer of the model.
        seq_length: tokens that the model reads at once.
        micro_batch_size: number of windows in one forward pass.
        dp: the data-parallel axis; all ranks share one model, so its size is 1.
    """

    model: LikelihoodModel
    tokenizer: Tokenizer
    seq_length: int
    micro_batch_size: int
    dp: Axis = field(default_factory=lambda: Axis.alone("dp"))

    def score_continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        A context that is too long loses its beginning; an empty one is replaced by the start token.

        Returns:
            For each (context, continuation), the continuation's log-probability, and whether it is the most probable one.

        Raises:
            DataError: a continuation has no token, or more than the model reads at once.
        """
        windows = []
        for context, continuation in pairs:
            before, after = self.tokenize_pair(context, continuation)
            if not 1 <= len(after) <= self.seq_length:
                raise DataError(
                    f"the continuation {quote_start(continuation)} has {len(after)} tokens; it must have 1 to "
                    f"{self.seq_length}, which the model reads at once"
                )
            windows.append(Window([*before, *after][-self.seq_length - 1 :], len(after)))
        return [(score.log_probability, score.hit) for score in self._score(windows)]

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Return each text's log-probability after the start token; a long text is scored in windows, every token once."""
        text_numbers: list[int] = []  # of each window
        windows: list[Window] = []
        for number, text in enumerate(texts):
            tokens = [self.start, *self.tokenizer.tokenize(text)]
            new_windows = list(split_windows(tokens, self.seq_length, self.seq_length, full=True))
            windows += new_windows
            text_numbers += [number] * len(new_windows)
        sums = [0.0] * len(texts)  # the log-probability of a text is the sum over its windows
        for number, score in zip(text_numbers, self._score(windows), strict=True):
            sums[number] += score.log_probability
        return sums

    def generate_until(self, prompt: str, stops: Sequence[str], max_tokens: int, sampling: Sampling, seed: int = 0) -> str:
        """Return the text that the model generates after a prompt, up to but without the first stop string.

        Args:
            prompt: text to continue; it loses its beginning if it leaves no room for `max_tokens`.
            stops: strings that end the text.
            max_tokens: maximum number of generated tokens.
            sampling: temperature and limits by which tokens are drawn.
            seed: seed of the random numbers.

        Raises:
            DataError: `max_tokens` leaves no room for any prompt.
        """
        room = self.seq_length - max_tokens
        if room < 1:
            raise DataError(
                f"{max_tokens} tokens to generate leave no room for a prompt in the {self.seq_length} that the model reads "
                "at once; set max_gen_toks in the task's generation_kwargs, or with --gen_kwargs"
            )
        tokens = (self.tokenizer.tokenize(prompt) or [self.start])[-room:]
        check_vocabulary(tokens, self.model.config.known_vocab_size, f"the prompt {quote_start(prompt)}")
        generated: list[int] = []
        text, eod = "", self.tokenizer.special.get("eod")
        for token in generate_tokens(self.model, tokens, max_new_tokens=max_tokens, sampling=sampling, seed=seed, stop=eod):
            generated.append(token)
            text = self.tokenizer.detokenize(generated)  # all tokens together, since one may be only a part of a character
            if ends := [text.index(stop) for stop in stops if stop and stop in text]:
                return text[: min(ends)]
        return text

    @property
    def start(self) -> int:
        """The token that replaces an empty context: begin-of-text if the tokenizer has it, else end-of-document."""
        return self.tokenizer.token("bos" if "bos" in self.tokenizer.special else "eod")

    def tokenize_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of its continuation.

        They are tokenized together, since a tokenizer can merge characters of both, and split where the context ends. Spaces at
        the end of the context become part of the continuation.
        """
        # " a" is one token in most vocabularies, while "a" after a token of spaces hardly ever occurs in training.
        stripped = context.rstrip()
        if not stripped:
            return [self.start], self.tokenizer.tokenize(context + continuation)
        before = self.tokenizer.tokenize(stripped)
        both = self.tokenizer.tokenize(context + continuation)
        return both[: len(before)], both[len(before) :]

    def _score(self, windows: Sequence[Window]) -> list[WindowScore]:
        """Return the scores of windows, in their order.

        The longest windows are scored first, so that those of a micro-batch have similar lengths, and the first one needs the
        most memory.
        """
        vocabulary = self.model.config.known_vocab_size
        for window in windows:
            check_vocabulary(window.tokens, vocabulary, "the text")
        order = sorted(range(len(windows)), key=lambda number: -len(windows[number].tokens))
        scores = score_windows(self.model, (windows[number] for number in order), self.micro_batch_size, self.dp)
        score_by_number = dict(zip(order, scores, strict=True))
        check_finite(sum(score.log_probability for score in score_by_number.values()), "the checkpoint")
        return [score_by_number[number] for number in range(len(windows))]


def quote_start(text: str) -> str:
    """Return the beginning of a text in quotes, for a message."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
