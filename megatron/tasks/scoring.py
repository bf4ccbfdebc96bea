"""Compute log-probabilities of windows of text with a model on any layout, and check the inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from megatron.config.errors import ConfigError, Problem
from megatron.config.schema import ModelConfig
from megatron.contract import Batch
from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.inference.pipeline import Pipeline
from megatron.inference.restore import OpenedModel
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Axis
from megatron.tasks.windows import Window


class ScoringModel(Protocol):
    """A model that scores tokens, such as an `inference.pipeline.Pipeline`, on one rank or several."""

    config: ModelConfig
    device: torch.device

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the labels' log-probabilities, fp32, and whether each is the most probable token; both `[seq, batch]`."""
        ...


@dataclass(frozen=True)
class WindowScore:
    """The score of one window.

    Attributes:
        log_probability: sum of the scored labels' log-probabilities.
        hit: every scored label is the most probable token at its position.
    """

    log_probability: float
    hit: bool


def score_windows(
    model: ScoringModel, windows: Iterable[Window], micro_batch_size: int, dp: Axis, watch: Watchdog | None = None
) -> Iterator[WindowScore]:
    """Yield the scores of this data-parallel rank's share of the windows, in order.

    Of each block of dp micro-batches, rank r scores windows r, r + dp, r + 2 dp, ... Collective over the ranks that share a
    model, each of which must consume the whole iterator.

    Args:
        model: the model.
        windows: all windows, the same on all ranks.
        micro_batch_size: number of windows in one forward pass of a rank.
        dp: the data-parallel axis.
        watch: the watchdog, to which the phases are reported; None reports nothing.
    """
    watch, remaining, done = watch or Watchdog(), iter(windows), 0
    while block := list(islice(remaining, micro_batch_size * dp.size)):
        watch.doing(f"scoring windows {done} to {done + len(block) - 1}")
        done += len(block)
        if own := block[dp.rank :: dp.size]:  # empty on all ranks that share a model or on none, since they share dp.rank
            batch = batch_windows(own, model.device)
            values, hits = model.scores(batch)  # both [seq, batch]
            is_scored = batch.loss_mask.t() > 0  # [seq, batch]
            sums = values.double().masked_fill(~is_scored, 0.0).sum(dim=0)  # [batch], fp64
            yield from map(WindowScore, sums.tolist(), (hits | ~is_scored).all(dim=0).tolist())
    watch.waiting("waiting for the scores of all ranks")


def batch_windows(windows: Sequence[Window], device: torch.device) -> Batch:
    """Collate windows into a batch, padded at the end to the longest one; a causal model does not attend to the padding."""
    longest = max(len(window.tokens) for window in windows)
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)  # [batch, seq + 1]
    mask = torch.zeros(len(windows), longest - 1)  # [batch, seq]
    for row, window in enumerate(windows):
        size = len(window.tokens)
        ids[row, :size] = torch.as_tensor(window.tokens)
        # The scored labels are the last ones of the window.
        mask[row, size - 1 - window.num_scored : size - 1] = 1.0
    positions = torch.arange(longest - 1).expand(len(windows), -1)  # [batch, seq]
    samples = torch.zeros(len(windows), dtype=torch.int64)  # [batch]; used only by dropout, which is off
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask, positions, samples).to(device)


def check_scoring_sizes(opened: OpenedModel[Pipeline], seq_length: int, overlap: int, micro_batch_size: int) -> None:
    """Check that the sizes of an evaluation fit a model.

    Args:
        opened: the model.
        seq_length: tokens that the model reads at once.
        overlap: distance between the starts of two windows.
        micro_batch_size: number of windows in one forward pass.

    Raises:
        ConfigError: sizes do not fit; lists a problem for each.
        DataError: the model is not a GPT.
    """
    config = opened.config
    if config.architecture != "gpt":
        raise DataError(f"{opened.directory} is a BERT, which predicts masked words and gives no probability of a text")
    problems = []
    if micro_batch_size < 1:
        problems.append(Problem(f"`--micro-batch-size {micro_batch_size}`", "leaves no window to score", "1 and above"))
    if seq_length < 1:
        problems.append(Problem(f"`--seq-length {seq_length}`", "is not a length", "1 and above"))
    elif config.position_embedding_type == "learned_absolute":
        last = config.max_position_embeddings
        if seq_length > last:
            rule = f"is longer than the model of {opened.directory}, which has {last} positions"
            problems.append(Problem(f"`--seq-length {seq_length}`", rule, f"1 to {last}"))
    if seq_length >= 1 and not 1 <= overlap <= seq_length:
        rule = "must not skip tokens nor be 0: it is the distance between the starts of two windows"
        problems.append(Problem(f"`--overlapping-eval {overlap}`", rule, f"1 to {seq_length}, the --seq-length"))
    if problems:
        raise ConfigError(problems)


def check_finite(total: float, where: str) -> None:
    """Raise a DataError if `total`, a sum of log-probabilities, is not finite. where: begins the message."""
    if not math.isfinite(total):
        raise DataError(f"{where}: the model's probabilities are not finite: its weights are damaged, or its training diverged")


def check_vocabulary(tokens: Sequence[int], vocab_size: int, where: str) -> None:
    """Check that token ids are in the vocabulary.

    Args:
        tokens: token ids of a text.
        vocab_size: size of the model's vocabulary.
        where: place of the text, for the message.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        wrong = max(tokens) if max(tokens) >= vocab_size else min(tokens)
        raise DataError(f"{where}: token {wrong} is outside the model's vocabulary of {vocab_size} tokens")


def require_tokenizer(opened: OpenedModel[Pipeline]) -> Tokenizer:
    """Return the checkpoint's tokenizer; DataError if it has none."""
    if opened.tokenizer is None:
        raise DataError(f"{opened.directory} has no tokenizer, which text needs: it was not saved by a pretraining run")
    return opened.tokenizer
