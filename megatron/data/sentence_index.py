"""Index of BERT samples: rows of (first sentence, end, target length), from the lengths of sentences and a seed.

The sentences of a document are joined in order until they reach a target length; a single sentence that remains is added to
the document's last sample. The target is the maximum length, or with probability `short_prob` a random shorter one, as in the
BERT paper (arXiv 1810.04805), so that the model is also trained on short inputs. The rows are then shuffled. Random numbers
and order are those of Megatron-LM's sample map, so the same data give the same samples.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MAX_SENTENCE_TOKENS = 512  # a document with a longer sentence, in tokens, is skipped, as in Megatron-LM
DRAW_BLOCK = 1 << 14  # random numbers drawn at a time
# Number of state words of the 64-bit Mersenne twister, and the distance to the word it combines (NN and MM; Nishimura, 2000).
STATE_WORDS, MIDDLE = 312, 156


def build_sentence_index(
    documents: NDArray[np.int64],
    lengths: NDArray[np.int32],
    *,
    max_tokens: int,
    short_prob: float,
    seed: int,
    num_samples: int | None,
    min_sentences: int,
) -> NDArray[np.int64]:
    """Cut documents into samples of whole sentences, in training order, as Megatron-LM does.

    Args:
        documents: int64 `[n + 1]`, the sentence at which each document starts, and the end of the last document.
        lengths: int32, tokens of every sentence.
        max_tokens: maximum number of tokens of a sample, without special ones.
        short_prob: fraction of samples with a random target length.
        seed: seed of the target lengths and of the order.
        num_samples: minimum number of samples; None for one epoch.
        min_sentences: minimum number of sentences of a sample; 2 if it is to be split into two segments.

    Returns:
        int64 `[samples, 3]`: first sentence, end, target length in tokens. Empty if no document has enough sentences.
    """
    if max_tokens < 2:
        raise ValueError(f"samples of {max_tokens} tokens")
    usable = _usable_documents(documents, lengths, min_sentences)
    targets = _target_lengths(max_tokens, short_prob, np.random.RandomState(seed))
    rows: list[tuple[int, int, int]] = []
    target = -1
    while usable and (target < 0 or (num_samples is not None and len(rows) < num_samples)):  # one iteration per epoch
        for first, end in usable:
            target = next(targets)
            # Running sum of the sentences' tokens, which bisection can search.
            ends = np.cumsum(lengths[first:end], dtype=np.int64).tolist()  # [sentences]
            begin, count = 0, end - first
            while begin < count:
                before = ends[begin - 1] if begin else 0
                last = max(bisect_left(ends, before + target, begin), begin + min_sentences - 1)
                # A single remaining sentence is added to this sample.
                stop = count if last >= count - 2 else last + 1
                rows.append((first + begin, first + stop, target))
                # Also after a document's last sample, whose next target is not used, since Megatron-LM draws it.
                begin, target = stop, next(targets)
    samples = np.array(rows, dtype=np.int64).reshape(-1, 3)  # [samples, 3]
    return samples[_shuffled_range(len(samples), seed + 1)]


def _usable_documents(documents: NDArray[np.int64], lengths: NDArray[np.int32], min_sentences: int) -> list[tuple[int, int]]:
    """Return first sentence and end of each usable document.

    It has enough sentences, and none of them is too long, unless it is the only one.
    """
    starts, ends = np.asarray(documents[:-1], dtype=np.int64), np.asarray(documents[1:], dtype=np.int64)
    # Number of too long sentences before each one: equal at two sentences if none between is too long.
    too_long = np.concatenate([[0], np.cumsum(lengths > MAX_SENTENCE_TOKENS)])
    counts = ends - starts
    is_usable = (counts >= max(min_sentences, 1)) & ((counts == 1) | (too_long[ends] == too_long[starts]))
    return list(zip(starts[is_usable].tolist(), ends[is_usable].tolist(), strict=True))


def _target_lengths(max_tokens: int, short_prob: float, random: np.random.RandomState) -> Iterator[int]:
    """Yield target lengths forever: `max_tokens`, or with probability `short_prob` 2 to `max_tokens`."""
    one_in = round(1.0 / short_prob) if short_prob > 0 else 0
    while True:
        if not one_in:  # no random numbers are drawn
            yield max_tokens
            continue
        for number in random.randint(0, 1 << 32, size=DRAW_BLOCK, dtype=np.uint32).tolist():
            yield max_tokens if number % one_in else 2 + number % (max_tokens - 1)


def _shuffled_range(count: int, seed: int) -> NDArray[np.int64]:
    """Return the numbers below `count` in random order (Fisher-Yates), with the 64-bit Mersenne twister."""
    order = list(range(count))
    if count < 2:
        return np.array(order, dtype=np.int64)
    upper = np.arange(count - 1, 0, -1, dtype=np.uint64)
    others = (_mersenne_64(seed, count - 1) % (upper + np.uint64(1))).tolist()
    for i, j in zip(range(count - 1, 0, -1), others, strict=True):
        order[i], order[j] = order[j], order[i]
    return np.array(order, dtype=np.int64)


def _mersenne_64(seed: int, count: int) -> NDArray[np.uint64]:
    """Return the first `count` numbers of C++'s `std::mt19937_64` with this seed.

    Megatron-LM shuffles with that generator (Nishimura, 2000); numpy has only the 32-bit one.
    """
    words = [seed & (2**64 - 1)]
    for i in range(1, STATE_WORDS):
        words.append((6364136223846793005 * (words[-1] ^ (words[-1] >> 62)) + i) & (2**64 - 1))
    state, blocks = np.array(words, dtype=np.uint64), []
    for _ in range(-(-count // STATE_WORDS)):
        # A new word depends on the old word, the one after it and the one half a state ahead, so that all words of one half can
        # be computed at once.
        following = np.empty(STATE_WORDS, dtype=np.uint64)
        for half, ahead in (
            (slice(0, MIDDLE), state[MIDDLE:]),
            (slice(MIDDLE, STATE_WORDS), following[:MIDDLE]),
        ):
            after = np.append(state[1:], following[0])[half]
            mixed = (state[half] & np.uint64(0xFFFFFFFF80000000)) | (after & np.uint64(0x7FFFFFFF))
            odd = np.where(mixed & np.uint64(1), np.uint64(0xB5026F5AA96619E9), np.uint64(0))
            following[half] = ahead ^ (mixed >> np.uint64(1)) ^ odd
        state = following  # [STATE_WORDS]
        x = state.copy()  # tempering applies to the output, not to the state
        x ^= (x >> np.uint64(29)) & np.uint64(0x5555555555555555)
        x ^= (x << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
        x ^= (x << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
        x ^= x >> np.uint64(43)
        blocks.append(x)
    return np.concatenate(blocks)[:count]
