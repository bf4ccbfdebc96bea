"""A resumed run says that its samples come in another order if, and only if, they do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bert_recipes import CLS, MASK, MAX_LENGTH, SEP, continuation_ids
from recipes import corpus_recipe, write_corpus

from megatron.config.schema import DataConfig, DataSettings
from megatron.data.bert import BertDataset, PairRules
from megatron.data.build import build_datasets
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import MicroBatchLoader
from megatron.data.masking import MaskingRules
from megatron.data.order import order_differs, order_marks

COUNT, SEED = 100, 1234
# What changes; for the blends below as well. What differs follows from the samples themselves.
CHANGES = {
    "nothing": {},
    "more iterations": {"count": 110},
    "fewer": {"count": 60},
    "many epochs more": {"count": 2000},
    "seed": {"seed": 7},
    "seq_length": {"seq_length": 9},
    "split": {"split": "80,10,10"},
    "split by a little": {"split": "900001,49999,50000"},
    "cyclic": {"dataloader_type": "cyclic"},
    "reset flags": {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True},
    "other data": {"data_path": ("p1",)},
    "a copy of the data": {"data_path": ("copy",)},
    "a single weight": {"data_path": ("1.0", "p0")},
    "a blend": {"data_path": ("0.9", "p0", "0.1", "p2")},
}
BLENDS = [("p0",), ("0.99", "p0", "0.01", "p1"), ("p0", "p1", "p2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    for number in range(3):
        write_corpus(made / f"p{number}", corpus_recipe(number))
    write_corpus(made / "copy", corpus_recipe(0))
    return made


def open_training_samples(folder: Path, count=COUNT, seed=SEED, **settings):
    """The training samples of a run, and what its loader needs."""
    data = DataConfig(**{"data_path": ("p0",), "split": "90,5,5", "seq_length": 8, "num_workers": 0} | settings)
    words = tuple(str(folder / word) if word[0] in "pc" else word for word in data.data_path)
    data = replace(data, data_path=words)
    return build_datasets(data, seed, (count, 0, 0))[0], count, data, seed


def read_samples(run) -> list[bytes]:
    """The samples that a run trains on, in order."""
    samples, count, data, seed = run
    taken = lambda dataset, numbers, names: [dataset[number].tokens.tobytes() for number in numbers]  # noqa: E731
    cyclic = data.dataloader_type == "cyclic"
    loader = MicroBatchLoader(samples, taken, 0, 1, 1, read_ahead=0, cyclic=cyclic, seed=seed)
    return [batch[0] for _ in range(count) for batch in loader.next_batches(1)]


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_said_iff_the_samples_differ(folder, change, blend, cyclic):
    base = {"data_path": blend, "dataloader_type": "cyclic" if cyclic else "single"}
    if len(blend) == 3 and CHANGES[change].get("count", 0) > 110:
        pytest.skip("one epoch holds not so many")
    before, after = open_training_samples(folder, **base), open_training_samples(folder, **base | CHANGES[change])
    differ = any(a != b for a, b in zip(read_samples(before), read_samples(after), strict=False))
    assert order_differs(order_marks(*before), after[0], *after[2:]) is differ
    if change in ("nothing", "reset flags") or (change, blend, cyclic) == ("a copy of the data", ("p0",), cyclic):
        assert not differ
    if change in ("seed", "seq_length"):
        assert differ


def test_within_an_epoch_and_beyond_it(folder):
    """The samples themselves say so: the second epoch is put together with the first."""
    whole = len(open_training_samples(folder, count=1)[0])
    for count, differs in ((whole, False), (whole + 1, True), (20 * whole, True)):
        before, after = open_training_samples(folder, count=whole // 2), open_training_samples(folder, count=count)
        assert order_differs(order_marks(*before), after[0], *after[2:]) is differs
        assert (read_samples(before) != read_samples(after)[: whole // 2]) is differs


def test_a_rare_dataset_that_is_built_anew_is_noticed(tmp_path):
    """The large one keeps its order, the small one is read a second time."""
    random = np.random.RandomState(3)
    for name, documents in (("p0", 4000), ("p1", 8)):
        write_corpus(tmp_path / name, [[random.randint(0, 60000, size=17)] for _ in range(documents)])
    blend = {"data_path": ("0.995", "p0", "0.005", "p1"), "split": "1,0,0"}
    before, after = open_training_samples(tmp_path, 2000, **blend), open_training_samples(tmp_path, 5000, **blend)
    pairs = list(zip(read_samples(before), read_samples(after), strict=False))
    assert 0 < sum(a != b for a, b in pairs) <= 11
    assert order_differs(order_marks(*before), after[0], *after[2:])


def test_the_order_of_bert_samples_ignores_the_masks(folder):
    """Other masks on the same sentences are the same order."""
    indexed = IndexedDataset(write_corpus(folder / "bert", [[s % 290 + 5 for s in d] for d in corpus_recipe(1)]))

    def samples(seed=SEED, wanted=100, longest=MAX_LENGTH, short=0.1, masked=0.15):
        masking = MaskingRules(MASK, frozenset({CLS, SEP}), continuation_ids(), masked)
        rules = PairRules(longest, short, True, CLS, SEP, masking, seed=seed)
        return BertDataset(indexed, range(len(indexed.documents) - 1), rules, wanted)

    marks = order_marks(samples(), 100, DataSettings(), SEED)
    one_epoch = len(samples(wanted=1))
    for change, differs in (
        ({}, False),
        ({"masked": 0.3}, False),
        ({"wanted": 99}, len(samples(wanted=99)) != len(samples())),
        ({"wanted": 100 + one_epoch}, True),
        ({"seed": 5}, True),
        ({"longest": 32}, True),
        ({"short": 0.5}, True),
    ):
        assert order_differs(marks, samples(**change), DataSettings(), SEED) is differs, change


@pytest.mark.parametrize("marks", [{"x": "y"}, {"-1": "y"}, {"99999999": "y"}, {"1": 5}])
def test_order_marks_of_any_content_are_compared(folder, marks):
    run = open_training_samples(folder)
    assert order_differs(marks, run[0], *run[2:]) is ("1" in marks)
    assert order_differs({}, run[0], *run[2:]) is None and order_differs(marks, None, *run[2:]) is None
