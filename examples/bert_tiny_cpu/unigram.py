"""Compute the loss of a model without any context on a run's held-out samples: the figure that a masked loss must stay below.

    python examples/bert_tiny_cpu/unigram.py runs/bert_tiny_cpu/checkpoints

Reads the samples that the run of this checkpoint trains on and is validated with, masked as the run masks them, and prints two
losses of the held-out masked tokens, in nats per token: for who knows how often each token is masked in training, and for who
knows it of the held-out samples themselves, which is their entropy; no guess that looks at no context loses less than that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    import numpy as np
    from numpy.typing import NDArray

    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.layout import CheckpointError, read_config
    from megatron.config.command_line.saved import from_json
    from megatron.data.build import build_datasets
    from megatron.data.errors import DataError
    from megatron.data.gpt import SampleSource
    from megatron.data.recipe import build_recipe
    from megatron.data.tokenizer import build_tokenizer
    from megatron.launch.tool_parser import ToolParser
    from megatron.train.run import sample_counts

MOST = 5_000  # samples of a split that are counted


def masked_counts(samples: SampleSource, number: int, vocab_size: int) -> NDArray[np.int64]:
    """Count how often each id is to be guessed.

    Args:
        samples: of BERT, masked.
        number: of them that are read, from the first.
        vocab_size: of the counts.

    Returns:
        int64 `[vocab_size]`.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for sample in (samples[i] for i in range(number)):
        np.add.at(counts, sample.labels[sample.loss_mask], 1)
    return counts


def cross_entropy(counts: NDArray[np.int64], shares: NDArray[np.float64]) -> float:
    """Mean loss of tokens that occur `counts` times, where each is guessed with the probability in `shares`; nats."""
    seen = counts > 0
    return float(-(counts[seen] * np.log(shares[seen])).sum() / counts.sum())


def main() -> int:
    """Run the program, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, help="SAVE of a run of pretrain_bert.py, or one iter_ directory")
    try:
        config = from_json(read_config(find_checkpoint(parser.parse_args().checkpoints)))
        if config.model.architecture != "bert":
            raise DataError("this is a checkpoint of a GPT, which masks nothing")
        tokenizer = build_tokenizer(config.tokenizer)
        recipe = build_recipe(config.model, config.data, config.batch.seed, tokenizer)
        wanted = sample_counts(config)
        training, validation, _ = build_datasets(config.data, config.batch.seed, wanted, tokenizer, recipe.make)
        if training is None or validation is None:
            raise DataError(f"--split {config.data.split} leaves training or validation without samples")
        trained = masked_counts(training, min(wanted[0], MOST), tokenizer.vocab_size)
        held_out = masked_counts(validation, min(wanted[1], MOST), tokenizer.vocab_size)
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # One is added to each count, or a token that training never masks would cost infinitely much.
    known = cross_entropy(held_out, (trained + 1) / (trained + 1).sum())
    own = cross_entropy(held_out, held_out / held_out.sum())
    print(f"guessed without context, the {held_out.sum():,} held-out masked tokens lose")
    print(f"  {known:.3f} from each token's share in training, {own:.3f} from its share among them")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
