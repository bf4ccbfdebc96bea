"""Settings of the data: indexed datasets, samples and micro-batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from megatron.config.check import ConfigCheck, Rules, missing
from megatron.config.errors import Problem
from megatron.config.notation import split_shares
from megatron.config.option import BETWEEN_0_AND_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, option
from megatron.config.paths import reason_unreadable, suggest_paths
from megatron.files.prefixes import suggest_prefix

PATHS = ("data.data_path", "data.train_data_path", "data.valid_data_path", "data.test_data_path")


@dataclass(frozen=True)
class DataSettings:
    """Data: indexed datasets, samples and micro-batches."""

    data_path: tuple[str, ...] = option((), "indexed datasets: PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ... for a blend")
    train_data_path: tuple[str, ...] = option((), "indexed datasets for training, instead of a share of --data-path")
    valid_data_path: tuple[str, ...] = option((), "indexed datasets for validation, likewise")
    test_data_path: tuple[str, ...] = option((), "indexed datasets for testing, likewise")
    data_args_path: str | None = option(None, "text file with the words that would follow --data-path", metavar="FILE")
    per_split_data_args_path: str | None = option(
        None,
        "JSON file with the lists train, valid and test: the words that would follow --train-data-path, --valid-data-path and "
        "--test-data-path",
        metavar="FILE",
    )
    mock_data: bool = option(
        False, "use synthetic samples, generated from --seed, instead of data; for trying out and timing a run"
    )
    split: str = option("969,30,1", "proportions of documents for training, validation and testing")
    data_cache_path: str | None = option(None, "directory for sample indices (default: `cache` beside the data)")
    seq_length: int | None = option(
        None, "sequence length of a sample, in tokens", aliases=("--encoder-seq-length",), legal=POSITIVE
    )
    num_workers: int = option(2, "batches to read ahead; 0: read in the training loop", legal=NOT_NEGATIVE)
    dataloader_type: str = option(
        "single", "order of samples; single: the dataset's; cyclic: reshuffled each epoch", choices=("single", "cyclic")
    )
    reset_position_ids: bool = option(False, "restart position ids at 0 after each end-of-document token")
    reset_attention_mask: bool = option(False, "do not attend across an end-of-document token")
    mask_prob: float = option(0.15, "BERT: share of the tokens that are masked and predicted", legal=BETWEEN_0_AND_1)
    short_seq_prob: float = option(0.1, "BERT: probability that a sample is shorter than --seq-length", legal=FROM_0_TO_1)
    eod_mask_loss: bool = option(False, "exclude predictions at an end-of-document token from the loss")


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataSettings):
    """Data of a run, with the sequence length."""

    seq_length: int = field()


def sample_length_given(c: ConfigCheck) -> Iterator[Problem]:
    """The sequence length is given."""
    yield from missing(c, ["data.seq_length"])


def shortest_pair(c: ConfigCheck) -> Iterator[Problem]:
    """A BERT sample has room for [CLS], two segments of one token each, and two [SEP]."""
    seq = c["data.seq_length"]
    if c["model.architecture"] == "bert" and seq is not None and seq < 5 and "data.seq_length" not in c.invalid:
        yield Problem(c.flag_text("data.seq_length"), "is too short for [CLS], two segments and two [SEP]", "5 and more")


def split(c: ConfigCheck) -> Iterator[Problem]:
    """--split consists of one to three shares, of which none is negative and not all are zero."""
    try:
        split_shares(c["data.split"])
    except ValueError:
        yield Problem(c.flag_text("data.split"), "is not up to three shares of training, validation and test", "e.g. 969,30,1")


def data_paths(c: ConfigCheck) -> Iterator[Problem]:
    """Data comes from --data-path, from one flag for each split, or is synthetic; a blend has a weight for each dataset."""
    split_flags = [n for n in ("data.train_data_path", "data.valid_data_path", "data.test_data_path") if c[n]]
    given = [n for n in ("data.data_path", *split_flags) if c[n]]
    if c["data.mock_data"] and given:
        yield Problem(
            f"`--mock-data` and {c.flag_text(given[0])}", "exclude each other: the samples are synthetic, or read from files"
        )
    elif c["data.data_path"] and split_flags:
        yield Problem(
            f"`--data-path` and `{c.flag(split_flags[0])}`",
            "exclude each other: the first is divided by --split, the second is one split",
        )
    elif not given and not c["data.mock_data"] and not c.planning:
        yield from missing(c, ["data.data_path"])
    for name in given:
        if error := blend_error(c[name]):
            yield Problem(c.flag_text(name), error)


def blend_error(words: Sequence[str]) -> str | None:
    """Return the mistake in the words after --data-path; None if there is none."""
    if prefixes(words) is None:
        return "mixes weights and prefixes; several datasets are WEIGHT PREFIX WEIGHT PREFIX ... or PREFIX PREFIX ..."
    weights = [] if len(words) == 1 else [word for word in words[::2] if parse_number(word) is not None]
    if wrong := [word for word in weights if not 0 < float(word) < inf]:
        return f"has the weight {wrong[0]}; weights are greater than 0: leave the dataset out instead"
    return None


def prefixes(words: Sequence[str]) -> list[str] | None:
    """Return the dataset prefixes among the words after --data-path; None if it mixes prefixes with and without weights."""
    # A prefix may look like a number, so a blend must have a number before every prefix.
    is_weight = [parse_number(word) is not None for word in words[::2]]
    if len(words) % 2 or not any(is_weight):
        return None if len(words) > 1 and any(parse_number(word) is not None for word in words) else list(words)
    return list(words[1::2]) if all(is_weight) else None


def parse_number(word: str) -> float | None:
    """Convert a word to a number; None if it is not one."""
    try:
        return float(word)
    except ValueError:
        return None


def datasets(c: ConfigCheck) -> Iterator[Problem]:
    """The files PREFIX.bin and PREFIX.idx of every dataset can be read."""
    for name in PATHS:
        for prefix in prefixes(c[name]) or ():
            level = "sentence" if c["model.architecture"] == "bert" else "document"
            yield from missing_dataset(c.options[name].text((prefix,)), prefix, level)


def missing_dataset(what: str, prefix: str, level: str = "document") -> Iterator[Problem]:
    """Yield the problems with the files of a dataset, if they cannot be read.

    Args:
        what: the setting that names the dataset, for messages.
        prefix: the dataset's prefix, or one of its two files.
        level: "sentence" or "document", with which preprocessing ends the prefixes of datasets for this program.
    """
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[:-4]
    files = [Path(prefix + ending) for ending in (".bin", ".idx")]
    wrong = [(path, why) for path in files if (why := reason_unreadable(path))]
    # If neither file exists, the prefix is probably misspelled, or lacks the suffix that preprocessing has added.
    if len(wrong) == 2 and not any(os.path.exists(path) for path in files):
        folder = files[0].parent
        names = sorted(p.name[:-4] for p in folder.glob("*.idx")) if os.access(folder, os.R_OK | os.X_OK) else None
        meant = suggest_prefix(prefix, level)
        hint = f"; {meant}" if meant else suggest_paths(Path(prefix), names)
        yield Problem(what, f"names no dataset: {prefix}.bin and {prefix}.idx do not exist{hint}")
        return
    for path, why in wrong:
        yield Problem(what, f"is not a dataset: {path} {why.split(';')[0] if why.startswith('does not exist') else why}")


RULES = Rules(every_run=(sample_length_given, shortest_pair), pretraining=(split, data_paths), disk=(datasets,))
