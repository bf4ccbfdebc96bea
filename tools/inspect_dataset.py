#!/usr/bin/env python
"""Show the contents of an indexed dataset: documents, tokens, text, and training samples in training order."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.config.rules import out_of_range
    from megatron.config.schema import DataConfig, DataSettings, RunSettings, TokenizerConfig
    from megatron.data.bert import SPECIAL_TOKENS, PairSample
    from megatron.data.blend import parse_blend
    from megatron.data.build import MakeDataset, bert_dataset_maker, build_datasets
    from megatron.data.errors import DataError
    from megatron.data.indexed import IndexedDataset
    from megatron.data.matching import adopt_dataset_roles, check_tokenizer
    from megatron.data.tokenizer import Tokenizer, build_tokenizer
    from megatron.data.tokenizer_flags import add_tokenizer_flags, tokenizer_config
    from megatron.launch.tool_parser import ToolParser, non_empty_name, non_negative_int


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = ToolParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "prefix", type=non_empty_name, nargs="+", metavar="PREFIX", help="a dataset's prefix, or a blend as for --data-path"
    )
    parser.add_argument(
        "--samples",
        type=non_negative_int,
        default=0,
        help="also show the first N samples of a run with --train-samples N",
    )
    parser.add_argument("--split", default=DataSettings().split, help="fractions of training, validation and test documents")
    parser.add_argument(
        "--model", choices=("gpt", "bert"), default="gpt", help="kind of samples; BERT's are pairs of masked segments"
    )
    parser.add_argument(
        "--bert-no-binary-head",
        action="store_true",
        help="for BERT: one segment per sample, as in pretrain_bert.py",
    )
    parser.add_argument("--mask-prob", type=float, default=DataSettings().mask_prob, help="for BERT: fraction of masked tokens")
    parser.add_argument(
        "--short-seq-prob", type=float, default=DataSettings().short_seq_prob, help="for BERT: fraction of short samples"
    )
    parser.add_argument("--seq-length", type=int, help="tokens per sample")
    parser.add_argument("--seed", type=int, default=1234, help="the run's seed")
    parser.add_argument("--data-cache-path", help="directory for built sample indices")
    parser.add_argument("--documents", type=non_negative_int, default=3, help="number of documents to show")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_tokenizer_flags(parser)
    return parser


def describe_dataset(dataset: IndexedDataset, tokenizer: Tokenizer | None, documents: int) -> dict[str, Any]:
    """Return the dataset's counts, its sidecar's metadata, and its first documents as ids and, with a tokenizer, as text.

    Args:
        dataset: the dataset.
        tokenizer: the tokenizer that made it; None if it is not known.
        documents: number of documents to decode, from the first.

    Raises:
        DataError: an id is outside of the tokenizer's vocabulary.
    """
    first = []
    for number in range(min(documents, dataset.document_count)):
        begin, end = dataset.documents[number : number + 2].tolist()
        ids = [int(i) for sequence in range(begin, end) for i in dataset[sequence]]
        bad = next((n for n, i in enumerate(ids) if tokenizer and not 0 <= i < tokenizer.vocab_size), None)
        if tokenizer and bad is not None:
            raise DataError(
                f"{dataset.bin_path}, document {number}, token {bad}: id {ids[bad]} is outside of the vocabulary of "
                f"{tokenizer.vocab_size} ids; the data was made with another tokenizer"
            )
        # The beginning is enough to recognize a document.
        first.append({"tokens": len(ids), "ids": ids[:64], **({"text": tokenizer.detokenize(ids[:256])} if tokenizer else {})})
    lengths = dataset.lengths
    return dict(
        prefix=dataset.prefix,
        documents=dataset.document_count,
        sequences=len(dataset),
        tokens=dataset.token_count,
        dtype=dataset.dtype.name,
        shortest_sequence=int(lengths.min()) if len(lengths) else None,
        longest_sequence=int(lengths.max()) if len(lengths) else None,
        meta=dataset.meta() or None,
        first_documents=first,
    )


def recorded_tokenizer(dataset: IndexedDataset) -> Tokenizer | None:
    """Return the tokenizer that the sidecar names; None if its files no longer exist or have changed."""
    meta = dataset.meta()
    try:
        tokenizer = build_tokenizer(TokenizerConfig(**meta["tokenizer"]))
    except (KeyError, TypeError, DataError):
        return None
    return tokenizer if tokenizer.digest() == meta.get("tokenizer_digest") else None


def training_samples(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[Any]:
    """Return the first `--samples` training samples: lists of token ids for GPT, see `describe_bert_sample` for BERT."""
    if args.seq_length is None or args.seq_length < 1:
        raise DataError("--samples needs --seq-length, the number of tokens per sample")
    data = DataConfig(
        data_path=tuple(args.prefix),
        split=args.split,
        seq_length=args.seq_length,
        data_cache_path=args.data_cache_path,
        mask_prob=args.mask_prob,
        short_seq_prob=args.short_seq_prob,
    )
    if args.model == "gpt":
        return [sample.tokens.tolist() for sample in first_samples(args, data, tokenizer, None)]
    if tokenizer is None:
        raise DataError("--model bert needs a tokenizer with [CLS], [SEP] and [MASK]: give --tokenizer-type")
    make = bert_samples(data, args.seed, tokenizer, binary=not args.bert_no_binary_head)
    return [describe_bert_sample(sample, tokenizer) for sample in first_samples(args, data, tokenizer, make)]


def first_samples(
    args: argparse.Namespace, data: DataConfig, tokenizer: Tokenizer | None, make: MakeDataset | None
) -> list[Any]:
    """Return the first training samples of a run with these flags.

    Args:
        args: the parsed command line.
        data: the run's data settings.
        tokenizer: the tokenizer that made the data; None if it is not known.
        make: the function that makes BERT's datasets; None for GPT's.

    Raises:
        DataError: the training split is empty.
    """
    training, _, _ = build_datasets(data, args.seed, (args.samples, 0, 0), tokenizer, make)
    if training is None:
        raise DataError(f"--split {args.split} leaves no documents for training")
    return [training[number] for number in range(args.samples)]


def bert_samples(data: DataConfig, seed: int, tokenizer: Tokenizer, *, binary: bool) -> MakeDataset:
    """Return the function that makes BERT's datasets.

    Args:
        data: the run's data settings.
        seed: the run's seed.
        tokenizer: a tokenizer with [CLS], [SEP] and [MASK].
        binary: each sample has two segments, for the binary head.

    Raises:
        DataError: pretrain_bert.py would refuse the settings.
    """
    if problems := [str(problem) for name, problem in out_of_range(RunSettings(data=data)) if name.startswith("data.")]:
        raise DataError("; ".join(problems))
    if data.seq_length < SPECIAL_TOKENS + 2:
        raise DataError(f"--seq-length {data.seq_length} is too short for [CLS], two segments and two [SEP]")
    return bert_dataset_maker(data, seed, tokenizer, binary=binary)


def describe_bert_sample(sample: PairSample, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a sample of BERT for JSON. `first`: length of the first segment; `guess`: original ids by masked position."""
    ids = sample.tokens.tolist()
    original_ids = {int(position): int(sample.labels[position]) for position in sample.loss_mask.nonzero()[0]}
    pieces = [
        f"{tokenizer.piece(i)}={tokenizer.piece(original_ids[n])}" if n in original_ids else tokenizer.piece(i)
        for n, i in enumerate(ids)
    ]
    return dict(tokens=ids, first=sample.first_length, swapped=sample.swapped, guess=original_ids, text=" ".join(pieces))


def print_report(report: dict[str, Any]) -> None:
    """Print the report as text."""
    for dataset in report["datasets"]:
        print(f"{dataset['prefix']}: {dataset['documents']} documents, {dataset['sequences']} sequences, "
              f"{dataset['tokens']} tokens of {dataset['dtype']}")  # fmt: skip
        if dataset["meta"]:
            print(f"  made by {dataset['meta'].get('tokenizer_type')}, {dataset['meta'].get('vocab_size')} ids")
        for number, document in enumerate(dataset["first_documents"]):
            content = repr(document["text"]) if "text" in document else " ".join(map(str, document["ids"]))
            print(f"  document {number}, {document['tokens']} tokens: {content[:200]}")
    for number, sample in enumerate(report.get("samples", [])):
        if isinstance(sample, dict):
            order = "swapped" if sample["swapped"] else "in order"
            print(f"sample {number}, {len(sample['tokens'])} tokens, {order}: {sample['text']}")
        else:
            print(f"sample {number}: {' '.join(map(str, sample))}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool, and return its exit status."""
    args = build_parser().parse_args(argv)
    prefixes, _ = parse_blend(args.prefix, "PREFIX")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    tokenizer = recorded_tokenizer(datasets[0]) if args.tokenizer_type is None else build_tokenizer(tokenizer_config(args))
    if tokenizer is not None:
        # Use the end-of-document token that the data records, which --eod-token may have set when it was made.
        adopt_dataset_roles(DataSettings(data_path=tuple(args.prefix)), tokenizer_config(args), tokenizer)
        for dataset in datasets:
            check_tokenizer(dataset, tokenizer)
    report: dict[str, Any] = {"datasets": [describe_dataset(dataset, tokenizer, args.documents) for dataset in datasets]}
    if len(datasets) == 1:
        report = {**report["datasets"][0], **report}  # the counts of a single dataset are at the top level as well
    if args.samples > 0:
        report["samples"] = training_samples(args, tokenizer)
    if args.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, wrong=DataError))
