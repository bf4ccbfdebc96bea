"""Masking for BERT: choose the tokens to predict, and the ids that the model sees in their place.

By default 15 % of the tokens are chosen, in runs of one to three whole words, where shorter runs are likelier. Of the chosen
tokens 80 % are replaced by [MASK], 10 % by a random id, and 10 % are left unchanged (arXiv 1810.04805; whole words and runs as
in Megatron-LM). The random numbers are drawn in Megatron-LM's order, so the same data give the same samples.
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
    """Settings of masking, and the properties of the vocabulary that it needs.

    Attributes:
        mask_id: id of [MASK].
        never_masked: ids that are never masked, those of [CLS] and [SEP].
        is_continuation: bool `[vocab_size]`, whether an id continues a word (WordPiece's `##`).
        mask_prob: fraction of the tokens to predict.
    """

    mask_id: int
    never_masked: frozenset[int]
    is_continuation: NDArray[np.bool_]
    mask_prob: float = 0.15


def mask_tokens(
    tokens: list[int], target_length: int, rules: MaskingRules, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Mask tokens of a sample.

    Args:
        tokens: ids of the sample, special ones included.
        target_length: length for which the sample was made, in tokens; at most `mask_prob * target_length` tokens are chosen.
        rules: settings of masking.
        random: draws the words, the lengths of runs and the replacements; its state advances.

    Returns:
        The ids that the model sees, and the positions to predict, in ascending order.
    """
    words = _word_positions(tokens, rules)
    limit = min(rules.mask_prob * target_length, max(1, round(len(tokens) * rules.mask_prob)))
    order = list(range(len(words)))
    random.shuffle(order)
    masked, chosen = list(tokens), set[int]()
    for first in order:  # words in random order; each may begin a run
        if len(chosen) >= limit:
            break
        longest = int(random.choice(RUN_LENGTHS, p=RUN_PROBABILITIES))
        # The longest run that does not exceed the limit; at the end of the text the slice makes a run shorter.
        for count in range(longest, 0, -1):
            run = [position for word in words[first : first + count] for position in word]
            if len(chosen) + len(run) <= limit:
                break
        else:
            continue  # even the single word would exceed the limit
        if not chosen.isdisjoint(run):
            continue  # an earlier run contains one of these words
        for position in run:
            masked[position] = _replacement(tokens[position], rules, random)
        chosen.update(run)
    return masked, sorted(chosen)


def _word_positions(tokens: list[int], rules: MaskingRules) -> list[list[int]]:
    """Return the positions of each word's tokens, without those of `never_masked`, which do not end a word."""
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in rules.never_masked:
            continue
        if words and rules.is_continuation[token]:
            words[-1].append(position)
        else:
            words.append([position])
    return words


def _replacement(token: int, rules: MaskingRules, random: np.random.RandomState) -> int:
    """Return the id that replaces a token to predict: [MASK] for 80 %, the token itself for 10 %, a random id for 10 %."""
    if random.random_sample() < 0.8:
        return rules.mask_id
    if random.random_sample() < 0.5:  # half of the other 20 %
        return token
    return int(random.randint(0, len(rules.is_continuation)))
