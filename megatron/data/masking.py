"""Masking for BERT: choose the tokens to predict, and what the model sees in their place. Pure: ids and a seed in, ids out.

15 % of the tokens are chosen, whole words and runs of up to three words at once, shorter runs being likelier; of the chosen
tokens 80 % are replaced by the mask, 10 % by a random id, 10 % stay (arXiv 1810.04805; whole words and runs as Megatron-LM
masks them). The random numbers are drawn in its order, so the same data give the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_RUN = 3  # words
RUN_LENGTHS = np.arange(1, MAX_RUN + 1)
RUN_PROBABILITIES = (1.0 / RUN_LENGTHS) / (1.0 / RUN_LENGTHS).sum()


@dataclass(frozen=True)
class MaskingRules:
    """Settings of masking, and what it must know of the vocabulary.

    Attributes:
        mask_id: id of [MASK].
        never_masked: ids that are never masked and end a word, those of [CLS] and [SEP].
        is_continuation: bool `[vocab_size]`, whether an id continues a word (WordPiece's `##`).
        mask_prob: share of the tokens to predict.
    """

    mask_id: int
    never_masked: frozenset[int]
    is_continuation: NDArray[np.bool_]
    mask_prob: float = 0.15


def mask_tokens(
    tokens: list[int], target: int, rules: MaskingRules, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Mask tokens of a sample.

    Args:
        tokens: ids of the sample, special ones included.
        target: tokens that the sample was meant to have; at most `mask_prob` of it are chosen, which is none for a tiny one.
        rules: settings of masking.
        random: draws words, lengths of runs and replacements.

    Returns:
        The ids that the model sees, and the positions to predict, in ascending order.
    """
    words = _words(tokens, rules)
    limit = min(rules.mask_prob * target, max(1, round(len(tokens) * rules.mask_prob)))
    order = list(range(len(words)))
    random.shuffle(order)
    seen, chosen = list(tokens), set[int]()
    for first in order:  # words in random order, each the beginning of a run
        if len(chosen) >= limit:
            break
        longest = int(random.choice(RUN_LENGTHS, p=RUN_PROBABILITIES))
        # The longest run that still fits into what is left; at the end of the text a run is shorter by itself.
        for count in range(longest, 0, -1):
            run = [position for word in words[first : first + count] for position in word]
            if len(chosen) + len(run) <= limit:
                break
        else:
            continue  # the word alone is too long
        if not chosen.isdisjoint(run):
            continue  # an earlier run holds one of these words
        for position in run:
            seen[position] = _shown(tokens[position], rules, random)
        chosen.update(run)
    return seen, sorted(chosen)


def _words(tokens: list[int], rules: MaskingRules) -> list[list[int]]:
    """Return the positions of each word's tokens. Tokens before the first word's beginning make a word of their own."""
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in rules.never_masked:
            continue
        if words and rules.is_continuation[token]:
            words[-1].append(position)
        else:
            words.append([position])
    return words


def _shown(token: int, rules: MaskingRules, random: np.random.RandomState) -> int:
    """Return the id shown in place of a token to predict: 80 % the mask, 10 % the token itself, 10 % a random id."""
    if random.random_sample() < 0.8:
        return rules.mask_id
    if random.random_sample() < 0.5:  # half of the other 20 %
        return token
    return int(random.randint(0, len(rules.is_continuation)))
