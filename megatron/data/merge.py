"""Merge several indexed datasets into one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron.data.errors import DataError
from megatron.data.indexed import DATASET_SUFFIXES, IndexedDataset, IndexedWriter
from megatron.files.outputs import InputPaths, check_file


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Return the prefixes that these prefixes and directories stand for, those of a directory in sorted order."""
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
    """Write the documents of all datasets, in this order, to a new one.

    Raises DataError if they do not belong together (number format, or tokenizers that their sidecars name), and OutputError if
    the output is one of them.
    """
    read = InputPaths(prefix + end for prefix in prefixes for end in DATASET_SUFFIXES)
    for end in DATASET_SUFFIXES:
        check_file("--output-prefix", output_prefix + end, read)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    metas = [dataset.meta() for dataset in datasets]
    # One dataset for each tokenizer that a sidecar names; those without one are taken for any.
    known = {meta["tokenizer_digest"]: number for number, meta in enumerate(metas) if meta.get("tokenizer_digest")}
    if len(known) > 1:
        kinds = "; ".join(
            f"{prefixes[n]} with {metas[n].get('tokenizer_type')} ({digest}, end of document {metas[n].get('eod')})"
            for digest, n in known.items()
        )
        if len({metas[n].get("vocabulary_digest", n) for n in known.values()}) == 1:
            kinds += "; they differ in special tokens alone"
        raise DataError(f"these datasets were made by different tokenizers: {kinds}")
    with IndexedWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)
        # The sidecar of the result claims a tokenizer only if that of every part does.
        writer.finish(metas[0] if all(meta.get("tokenizer_digest") for meta in metas) else None)
    return IndexedDataset(output_prefix)
