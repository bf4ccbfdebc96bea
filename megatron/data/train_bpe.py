"""Train a byte-level BPE vocabulary on text (arXiv 1508.07909, with GPT-2's byte-level alphabet)."""

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
    """Yield the texts of JSON lines, and the lines of .txt files; DataError if there is no text, or if a line is invalid."""
    check_keys(keys)
    has_text = False
    for file in files:
        is_plain = bare_name(file).endswith(".txt")
        for lines in read_blocks([file], pipes=True):
            for line in lines:
                texts = [_decode_line(line)] if is_plain else _json_texts(line, keys)
                has_text = has_text or any(map(str.strip, texts))
                yield from texts
    if not has_text:
        raise DataError(f"no text in {', '.join(files)}: nothing can be learnt from it")


def _decode_line(line: Line) -> str:
    try:
        return line.text.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{line.file}:{line.number}: {describe_utf8_error(error)}") from error


def _json_texts(line: Line, keys: Sequence[str]) -> list[str]:
    try:
        return parse_line(line, keys)
    except BadLine as error:
        raise DataError(str(error)) from error


def training_parts(backend: Backend, texts: Iterable[str]) -> Iterator[str]:
    """Return texts, long ones in parts that have the same words, since a trainer needs a hundred times a text's memory.

    backend: the tokenizer to be trained, whose steps determine where texts can be cut.
    """
    # From a copy, since a tokenizer is locked while it is trained, and its trainer would wait for these texts: a deadlock.
    seam = fast_seam(Backend.from_str(backend.to_str()))
    return (part for text in texts for part in split_text(text, lambda: seam))


def train_bpe(inputs: Sequence[str], keys: Sequence[str], vocab_size: int, output: str) -> int:
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt to a directory.

    `<|endoftext|>` is the last id, as in GPT-2.

    Args:
        inputs: names and globs of files of JSON lines or of text.
        keys: keys of the JSON objects whose values are the texts.
        vocab_size: maximum number of ids.
        output: the directory to write to; created if missing.

    Returns:
        The number of ids.

    Raises:
        DataError: if the input is invalid, or `vocab_size` is below 257.
        OutputError: if one of the files would replace an input.
    """
    if vocab_size < 257:
        raise DataError(f"--vocab-size {vocab_size}: at least 257, the bytes and {END_OF_TEXT}")
    files = expand_globs(inputs)
    for name in OUTPUT_FILES:
        check_file("--output", Path(output) / name, InputPaths(files))
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # All 256 bytes, so that any text can be tokenized. Sorted, since the trainer numbers them in this order.
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
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return backend.get_vocab_size()
