"""Whatever an .idx and a .bin hold, opening and reading them ends in arrays or in a DataError."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from fuzzing import INTEGERS, damaged_bytes, fuzz_settings
from hypothesis import given
from hypothesis import strategies as st
from recipes import write_corpus

from megatron.data.errors import DataError
from megatron.data.gpt import GPTDataset
from megatron.data.indexed import DTYPE_CODES, HEADER, MAGIC, IndexedDataset

DOCUMENTS = [[np.arange(5)], [np.arange(3), np.arange(4)], [], [np.arange(0)], [np.arange(9)]]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_corpus(folder / "good", DOCUMENTS)
    return folder


def read_whole_dataset(prefix: str) -> str:
    """Open a dataset and read all of it: every number that comes out was inside of the files."""
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:
        assert prefix in str(error)
        return "refused"
    assert sum(len(dataset[i]) for i in range(len(dataset))) == dataset.token_count
    assert dataset.document_count >= 0 and len(dataset.documents) == dataset.document_count + 1
    if 0 < dataset.token_count < 1000:
        samples = GPTDataset(dataset, range(len(dataset)), 2, 1, 3)
        assert all(len(samples[i].tokens) == 3 for i in range(len(samples)))
    return "read"


def test_damaged_indices(files):
    good = (files / "good.idx").read_bytes()
    seen = {"read": 0, "refused": 0}
    (files / "bad.bin").write_bytes((files / "good.bin").read_bytes())

    @fuzz_settings(400)
    @given(damaged_bytes(good))
    def run(data: bytes) -> None:
        (files / "bad.idx").write_bytes(data)
        seen[read_whole_dataset(str(files / "bad"))] += 1

    run()
    assert seen["refused"] > 100 and seen["read"] > 0


def test_made_up_indices(files):
    """Right in form, with counts, lengths, offsets and documents that are anything; .bin and sidecar of any size."""
    tables = st.lists(INTEGERS, max_size=6)
    seen = {"read": 0, "refused": 0}

    @fuzz_settings(200)
    @given(
        st.sampled_from([*DTYPE_CODES, 6, 7, 0]), tables, tables, tables, st.none() | INTEGERS, st.none() | INTEGERS,
        st.integers(0, 40), st.none() | INTEGERS | st.text(max_size=5), st.booleans(),
    )  # fmt: skip
    def run(code, lengths, offsets, documents, n, m, size, tokens, consistent) -> None:
        if consistent:  # so that more of them come past the first checks
            lengths = [abs(n) % 5 for n in lengths]
            width = DTYPE_CODES[code].itemsize if code in DTYPE_CODES else 1
            offsets = [width * sum(lengths[:i]) for i in range(len(lengths))]
            documents, size = [0, len(lengths)], width * sum(lengths)
            n = m = None
            tokens = None if tokens is None else sum(lengths)
        n, m = len(lengths) if n is None else n, len(documents) if m is None else m
        data = HEADER.pack(MAGIC, 1, code, n % 2**64, m % 2**64)
        data += b"".join(struct.pack("<I", v % 2**32) for v in lengths)
        data += b"".join(struct.pack("<Q", v % 2**64) for v in [*offsets, *documents])
        (files / "made.idx").write_bytes(data)
        (files / "made.bin").write_bytes(bytes(range(size)))
        sidecar = files / "made.meta.json"
        sidecar.unlink(missing_ok=True)
        if tokens is not None:
            sidecar.write_text(json.dumps({"tokens": tokens}))
        seen[read_whole_dataset(str(files / "made"))] += 1

    run()
    assert seen["refused"] > 20 and seen["read"] > 20
