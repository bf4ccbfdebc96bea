"""Micro-batches: which samples, for every layout and after every restart, and what is in a batch."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes import write_corpus

from megatron.config.schema import DataConfig, DataSettings
from megatron.contract import Batch
from megatron.data.batch import GPTCollator
from megatron.data.build import build_datasets
from megatron.data.errors import DataError
from megatron.data.gpt import GPTDataset, Sample
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import MicroBatchLoader


class NumberDataset:
    """A dataset whose sample i consists of the number i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Sample:
        return Sample(np.full(3, number, dtype=np.int64))

    def locate(self, number: int, position: int) -> str:
        return f"file, sample {number}, token {position}"


MAKE = GPTCollator(vocab_size=1000)


def sample_numbers(batches: list[Batch]) -> list[list[int]]:
    assert all(torch.equal(b.samples, b.tokens[:, 0]) for b in batches)
    return [b.samples.tolist() for b in batches]


def test_micro_batches_are_dealt_out_over_ranks() -> None:
    """Micro-batch j of rank r starts at consumed + (2 j + r) * 3."""
    ranks = [MicroBatchLoader(NumberDataset(100), MAKE, rank, 2, 3, 12) for rank in range(2)]
    assert [sample_numbers(rank.next_batches(12)) for rank in ranks] == [
        [[12, 13, 14], [18, 19, 20]],
        [[15, 16, 17], [21, 22, 23]],
    ]
    assert [rank.consumed for rank in ranks] == [24, 24]


@pytest.mark.parametrize("cyclic", [False, True])
def test_same_samples_for_every_layout(cyclic: bool) -> None:
    def step_sets(dp: int, size: int) -> list[list[int]]:
        ranks = [MicroBatchLoader(NumberDataset(48), MAKE, rank, dp, size, read_ahead=dp, cyclic=cyclic) for rank in range(dp)]
        steps = []
        for _ in range(4):
            batches = [batch for rank in ranks for batch in rank.next_batches(12)]
            steps.append(sorted(int(n) for batch in batches for n in batch.tokens[:, 0]))
        return steps

    layouts = [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (4, 3)]
    first, *others = [step_sets(*layout) for layout in layouts]
    assert all(other == first for other in others)
    assert sorted(n for step in first for n in step) == list(range(48))
    assert (first[0] == list(range(12))) is not cyclic


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("read_ahead", [0, 1, 5])
def test_restart_and_changing_batch_size(read_ahead: int, cyclic: bool) -> None:
    """A ramp of the global batch, stopped at any step and started again, hands out the same."""
    sizes = [4, 4, 8, 8, 12, 12]

    def run(start: int, consumed: int) -> list[Any]:
        loader = MicroBatchLoader(NumberDataset(48), MAKE, 1, 2, 2, consumed, read_ahead=read_ahead, cyclic=cyclic)
        return [[b.tokens[:, 0].tolist() for b in loader.next_batches(size)] for size in sizes[start:]]

    whole = run(0, 0)
    for start in range(1, len(sizes)):
        assert run(start, sum(sizes[:start])) == whole[start:]


def test_cyclic_reshuffles_each_epoch_and_goes_on() -> None:
    loader = MicroBatchLoader(NumberDataset(8), MAKE, 0, 1, 2, cyclic=True, seed=7)
    epochs = [[int(n) for b in loader.next_batches(8) for n in b.tokens[:, 0]] for _ in range(3)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    assert loader.next_batches(2)[0].samples.tolist() == [24, 25]  # numbers of the training order go on
    other = MicroBatchLoader(NumberDataset(8), MAKE, 0, 1, 2, cyclic=True, seed=8)
    assert [int(n) for b in other.next_batches(8) for n in b.tokens[:, 0]] != epochs[0]


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_running_out_is_an_error(read_ahead: int) -> None:
    loader = MicroBatchLoader(NumberDataset(10), MAKE, 0, 1, 2, read_ahead=read_ahead, name="validation")
    loader.next_batches(8)
    with pytest.raises(DataError, match=r"validation data: 8 samples are used and the next step takes 4.*built with 10"):
        loader.next_batches(4)
    assert loader.consumed == 8 and sample_numbers(loader.next_batches(2)) == [[8, 9]]
    with pytest.raises(DataError, match="no samples"):
        MicroBatchLoader(NumberDataset(0), MAKE, 0, 1, 2, read_ahead=read_ahead, cyclic=True).next_batches(2)


def test_a_batch_size_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="6"):
        MicroBatchLoader(NumberDataset(10), MAKE, 0, 2, 3).next_batches(8)


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_errors_of_the_thread_surface_where_they_belong(read_ahead: int) -> None:
    """The bad sample 7 is read ahead early, but fails the step that takes it, and each later one."""
    make = GPTCollator(vocab_size=7)
    loader = MicroBatchLoader(NumberDataset(20), make, 0, 1, 1, read_ahead=read_ahead)
    assert len(loader.next_batches(7)) == 7
    for _ in range(2):
        with pytest.raises(DataError, match=r"sample 7, token 0: id 7 .* 7 ids"):
            loader.next_batches(1)
    assert loader.consumed == 7


def test_read_ahead_is_bounded_and_its_thread_ends() -> None:
    made: list[int] = []

    def make(dataset: Any, numbers: Any, names: Any) -> Batch:
        made.append(names[0])
        return MAKE(dataset, numbers, names)

    loader = MicroBatchLoader(NumberDataset(100), make, 0, 1, 1, read_ahead=3)
    loader.next_batches(2)
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(made) == 6  # two handed out, three waiting, one in the thread's hands
    threads = [t for t in threading.enumerate() if t.name == "read-ahead"]
    del loader
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_batch_content() -> None:
    """End of document 9 at positions 2 and 3: masked, positions restart after it, documents are counted."""
    dataset = NumberDataset(1)
    dataset.__class__ = type("One", (NumberDataset,), {"__getitem__": lambda *_: Sample(np.array([1, 2, 9, 9, 5, 6]))})
    plain = GPTCollator(vocab_size=10, eod=9)(dataset, [0], [17])
    assert plain.tokens.tolist() == [[1, 2, 9, 9, 5]] and plain.labels.tolist() == [[2, 9, 9, 5, 6]]
    assert plain.loss_mask.tolist() == [[1] * 5] and plain.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert plain.documents is None and plain.samples.tolist() == [17]
    every = GPTCollator(10, 9, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)(dataset, [0], [17])
    assert every.loss_mask.tolist() == [[1, 1, 0, 0, 1]]
    assert every.positions.tolist() == [[0, 1, 2, 0, 0]]
    assert every.documents is not None and every.documents.tolist() == [[0, 0, 0, 1, 2]]
    for name in ("tokens", "labels", "positions", "samples", "documents"):
        assert getattr(every, name).dtype == torch.int64
    assert every.loss_mask.dtype == torch.float32


def test_resets_against_a_loop() -> None:
    """The reference's own loop over the ends of documents, on random samples."""
    random = np.random.RandomState(0)
    for _ in range(20):
        tokens = random.randint(0, 4, size=(1, 33))

        class One(NumberDataset):
            def __getitem__(self, number: int, tokens: Any = tokens) -> Sample:
                return Sample(tokens[0])

        batch = GPTCollator(4, 0, reset_position_ids=True, reset_attention_mask=True)(One(1), [0], [0])
        positions, allowed, previous = np.arange(32), np.tril(np.ones((32, 32), dtype=bool)), 0
        for end in np.flatnonzero(tokens[0, :-1] == 0):
            allowed[end + 1 :, : end + 1] = False
            positions[end + 1 :] -= end + 1 - previous
            previous = end + 1
        assert batch.positions[0].tolist() == positions.tolist() and batch.documents is not None
        same = batch.documents[0][:, None] == batch.documents[0][None]
        assert (same.numpy() & np.tril(np.ones((32, 32), dtype=bool)) == allowed).all()


def test_options_without_an_end_of_document() -> None:
    with pytest.raises(DataError, match="--eod-mask-loss"):
        GPTCollator.from_config(DataSettings(eod_mask_loss=True), 10, None)


def test_from_files_to_batches(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "p", [[np.array([1, 2, 3, 500, 4, 5, 6, 7, 8])]])
    data = DataConfig(data_path=(prefix,), split="1", seq_length=2)
    training, _, _ = build_datasets(data, 1, (4, 0, 0))
    assert training is not None
    batches = MicroBatchLoader(training, GPTCollator.from_config(data, 501, None), 0, 1, 2).next_batches(4)
    rows = {tuple(row) for b in batches for row in torch.cat([b.tokens, b.labels[:, -1:]], dim=1).tolist()}
    assert rows == {(1, 2, 3), (3, 500, 4), (4, 5, 6), (6, 7, 8)}
    with pytest.raises(DataError, match=r"p\.bin, document 0, token 3: id 500"):
        MicroBatchLoader(training, GPTCollator.from_config(data, 500, None), 0, 1, 4).next_batches(4)


def test_negative_ids_are_found(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "p", [[np.array([1, -2, 3])]], "<i4")
    dataset = GPTDataset(IndexedDataset(prefix), range(1), 2, 1, None)
    with pytest.raises(DataError, match="token 1: id -2"):
        GPTCollator(10)(dataset, [0], [0])
