"""Train a byte-level BPE vocabulary on text (arXiv 1508.07909, in GPT-2's byte-level form)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.data.corpus import BadLine, Line, check_keys, describe_utf8_error, expand_globs, parse_line, read_blocks
from megatron.data.cuts import split_text
from megatron.data.errors import DataError
from megatron.data.fast_cuts import fast_seam
from megatron.data.packed import bare_name
from megatron.data.tokenizer_base import END_OF_TEXT
from megatron.files.outputs import InputPaths, check_file
from megatron.files.pending import write_whole

OUTPUT_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


def read_texts(files: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    """Yield the texts of JSON lines; of a .txt file, its lines. DataError where there is none, and for bad lines."""
    check_keys(keys)
    some = False
    for file in files:
        plain = bare_name(file).endswith(".txt")
        for lines in read_blocks([file], pipes=True):
            for line in lines:
                found = [_plain(line)] if plain else _values(line, keys)
                some = some or any(map(str.strip, found))
                yield from found
    if not some:
        raise DataError(f"no text in {', '.join(files)}: nothing can be learnt from it")


def _plain(line: Line) -> str:
    try:
        return line.text.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{line.file}:{line.number}: {describe_utf8_error(error)}") from error


def _values(line: Line, keys: Sequence[str]) -> list[str]:
    try:
        return parse_line(line, keys)
    except BadLine as error:
        raise DataError(str(error)) from error


def training_parts(backend: Backend, found: Iterable[str]) -> Iterator[str]:
    """Return texts, long ones in parts that have the same words: a trainer needs a hundred times the size of a text.

    backend: the tokenizer to be trained; says where texts can be cut.
    """
    # Of a copy, made now: while a tokenizer is trained it is locked, and its trainer waits for these texts.
    seam = fast_seam(Backend.from_str(backend.to_str()))
    return (part for text in found for part in split_text(text, lambda: seam))


def train_bpe(inputs: Sequence[str], keys: Sequence[str], vocab_size: int, output: str) -> int:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt to a directory.

    `<|endoftext|>` is the last id, as in GPT-2.

    Args:
        inputs: files and globs, of JSON lines or of text.
        keys: of the JSON objects.
        vocab_size: number of ids, at most.
        output: the directory, made where it is missing.

    Returns:
        The number of ids.

    Raises:
        DataError: for wrong input, or fewer than 257 ids.
        OutputError: where one of the files is an input.
    """
    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size}: at least 257, the bytes and {END_OF_TEXT}")
    files = expand_globs(inputs)
    for name in OUTPUT_FILES:
        check_file("--output", Path(output) / name, InputPaths(files))
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # All bytes from the start, so that any text can be written. Sorted: the trainer numbers them in this order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(training_parts(backend, read_texts(files, keys)), trainer)
    backend.add_special_tokens([END_OF_TEXT])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", backend.to_str(pretty=False) + "\n")
    model = json.loads(backend.to_str())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: backend.token_to_id(END_OF_TEXT)}
    write_whole(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    write_whole(folder / "merges.txt", "\n".join(["#version: 0.2", *pairs]) + "\n")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")
    return backend.get_vocab_size()
