"""Merge several indexed datasets into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron.data.errors import DataError
from megatron.data.indexed import DATASET_SUFFIXES, IndexedDataset, IndexedWriter
from megatron.files.outputs import InputPaths, check_file


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Return the prefixes of all datasets that are given by prefix or directory; those of a directory are sorted."""
    prefixes: list[str] = []
    for name in inputs:
        if os.path.isdir(name):
            found = sorted(str(path)[:-4] for path in Path(name).glob("*.idx"))
            if not found:
                raise DataError(f"--input {name}: no .idx file in this directory")
            prefixes += found
        else:
            prefixes.append(name[:-4] if name.endswith((".bin", ".idx")) else name)
    return prefixes


def merge_datasets(prefixes: Sequence[str], output_prefix: str) -> IndexedDataset:
    """Write the documents of all datasets, in this order, to a new one, and return it.

    Raises DataError if the datasets differ in number format or in the tokenizer that their sidecars name, and OutputError if
    the output would replace one of them.
    """
    inputs = InputPaths(prefix + end for prefix in prefixes for end in DATASET_SUFFIXES)
    for end in DATASET_SUFFIXES:
        check_file("--output-prefix", output_prefix + end, inputs)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    metas = [dataset.meta() for dataset in datasets]
    # One dataset for each tokenizer that a sidecar names; a dataset without a sidecar matches any tokenizer.
    by_digest = {meta["tokenizer_digest"]: number for number, meta in enumerate(metas) if meta.get("tokenizer_digest")}
    if len(by_digest) > 1:
        descriptions = "; ".join(
            f"{prefixes[n]} with {metas[n].get('tokenizer_type')} ({digest}, end of document {metas[n].get('eod')})"
            for digest, n in by_digest.items()
        )
        if len({metas[n].get("vocabulary_digest", n) for n in by_digest.values()}) == 1:
            descriptions += "; they differ only in special tokens"
        raise DataError(f"these datasets were made by different tokenizers: {descriptions}")
    with IndexedWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)
        # The result gets a sidecar only if every dataset has one that names the tokenizer.
        writer.finish(metas[0] if all(meta.get("tokenizer_digest") for meta in metas) else None)
    return IndexedDataset(output_prefix)
