"""Which tokens of a sentence pair BERT must guess, and what it sees in their place. Pure: ids and a seed in, ids out.

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
    """What masking must know of the vocabulary.

    mask: the id of the mask. apart: ids that are never masked and end a word, of [CLS] and [SEP]. continues: bool
    `[vocab_size]`, whether an id continues a word (WordPiece's `##`). share: of the tokens that are to be guessed.
    """

    mask: int
    apart: frozenset[int]
    continues: NDArray[np.bool_]
    share: float = 0.15


def mask_tokens(
    tokens: list[int], target: int, rules: MaskingRules, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """What the model sees of `tokens`, and the positions that it must guess, in ascending order.

    target: tokens that the sample was meant to have; no more than `share` of it are chosen, which is none for a tiny one.
    """
    words = _words(tokens, rules)
    limit = min(rules.share * target, max(1, round(len(tokens) * rules.share)))
    order = list(range(len(words)))
    random.shuffle(order)
    seen, chosen = list(tokens), set[int]()
    for first in order:
        if len(chosen) >= limit:
            break
        longest = int(random.choice(RUN_LENGTHS, p=RUN_PROBABILITIES))
        for count in range(longest, 0, -1):
            run = [position for word in words[first : first + count] for position in word]
            if len(chosen) + len(run) <= limit:
                break
        else:
            continue  # the word alone is too long
        if not chosen.isdisjoint(run):
            continue
        for position in run:
            seen[position] = _shown(tokens[position], rules, random)
        chosen.update(run)
    return seen, sorted(chosen)


def _words(tokens: list[int], rules: MaskingRules) -> list[list[int]]:
    """The positions of each word. Tokens before the first word's beginning make one of their own."""
    words: list[list[int]] = []
    for position, token in enumerate(tokens):
        if token in rules.apart:
            continue
        if words and rules.continues[token]:
            words[-1].append(position)
        else:
            words.append([position])
    return words


def _shown(token: int, rules: MaskingRules, random: np.random.RandomState) -> int:
    if random.random_sample() < 0.8:
        return rules.mask
    if random.random_sample() < 0.5:
        return token
    return int(random.randint(0, len(rules.continues)))
