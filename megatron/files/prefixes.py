"""Suggest a dataset with a similar name, or a text to preprocess, when the dataset of a prefix does not exist."""

from __future__ import annotations

import os
import re
from pathlib import Path

TEXT_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
ALL_TEXT_SUFFIXES = tuple(text + compression for text in TEXT_SUFFIXES for compression in ("", *COMPRESSION_SUFFIXES))
MAX_LISTED = 5  # maximum number of datasets in a message


def suggest_prefix(prefix: str, level: str) -> str | None:
    """Suggest what to give instead of a prefix without .bin and .idx files.

    Args:
        prefix: the prefix that the user gave.
        level: the kind of dataset that the program reads, which ends the dataset's name: `document` or `sentence`.

    Returns:
        A clause for an error message about the prefix, such as `give corpus_text_document, which is beside it`; None if no
        dataset or text has such a name.
    """
    stem = _without_suffix(prefix)
    text = next((path for path in (prefix, *(stem + suffix for suffix in ALL_TEXT_SUFFIXES)) if _is_text(path)), None)
    try:
        existing = _existing_datasets(stem)
    except OSError:
        existing = []
    candidates = existing if os.path.isdir(prefix) else [name for name in existing if name.endswith(f"_{level}")] or existing
    usable = [name for name in candidates if not name.endswith("_sentence" if level == "document" else "_document")]
    if usable:
        if len(usable) == 1:
            return f"give {usable[0]}, which is {'in' if os.path.isdir(prefix) else 'beside'} it"
        return f"give one of {', '.join(usable[:MAX_LISTED])}{', ...' if len(usable) > MAX_LISTED else ''}"
    level_flag = "--split-sentences" if level == "sentence" else "--append-eod"
    source = text or "TEXT.jsonl"
    command = f"python tools/preprocess_data.py --input {source} --output-prefix {stem} --tokenizer-type ... {level_flag}"
    if candidates:
        kind = "whole documents for GPT" if level == "sentence" else "single sentences for BERT"
        return f"only {candidates[0]} is beside it, with {kind}; create the other kind: `{command}`"
    if text is not None:
        return f"{text} is a text; preprocess it first: `{command}`, then give {stem}_text_{level}"
    return None


def _without_suffix(prefix: str) -> str:
    """Return the prefix without the suffixes of a text file and of its compression."""
    stem = prefix.rstrip("/") if os.path.isdir(prefix) else prefix
    for suffixes in (COMPRESSION_SUFFIXES, TEXT_SUFFIXES):
        stem = next((stem.removesuffix(suffix) for suffix in suffixes if stem.endswith(suffix)), stem)
    return stem


def _is_text(path: str) -> bool:
    """Return whether a path is a file with the suffix of a text, compressed or not."""
    return os.path.isfile(path) and path.endswith(ALL_TEXT_SUFFIXES)


def _existing_datasets(stem: str) -> list[str]:
    """Return the prefixes of all datasets in the directory `stem`, or of those preprocessed with `--output-prefix` `stem`."""
    folder, name = (Path(stem), "") if os.path.isdir(stem) else (Path(stem).parent, Path(stem).name)
    pattern = re.compile(re.escape(name) + r"_.+_(document|sentence)" if name else r".*")
    datasets = sorted(entry.name[:-4] for entry in os.scandir(folder) if entry.name.endswith(".idx"))
    return [
        str(folder / dataset) for dataset in datasets if pattern.fullmatch(dataset) and (folder / f"{dataset}.bin").exists()
    ]
