"""Train a WordPiece vocabulary on text, for BERT: as in BPE, pieces within words are merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron.data.corpus import expand_globs
from megatron.data.errors import DataError
from megatron.data.train_bpe import read_texts, training_parts
from megatron.files.outputs import InputPaths, check_file
from megatron.files.pending import write_whole

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION_PREFIX = "##"
MAX_ALPHABET = 1000  # number of characters, the most frequent ones; a word with another character is unknown


def train_wordpiece(inputs: Sequence[str], keys: Sequence[str], vocab_size: int, output: str, *, lower_case: bool) -> int:
    """Write vocab.txt to a directory, one piece per line.

    Special tokens come first, then single characters, then longer pieces, both sorted. The text is read twice, first for its
    characters: the trainer breaks ties by the pieces' ids, and the ids of characters vary between runs unless they are given.

    Args:
        inputs: names and globs of files of JSON lines or of text.
        keys: keys of the JSON objects whose values are the texts.
        vocab_size: maximum number of pieces.
        output: the directory to write to; created if missing.
        lower_case: convert texts to lower case.

    Returns:
        The number of pieces.

    Raises:
        DataError: if the input is invalid, or `vocab_size` is too small for all characters.
        OutputError: if vocab.txt would replace an input.
    """
    if vocab_size < len(SPECIAL_TOKENS):
        raise DataError(
            f"--vocab-size {vocab_size}: at least {len(SPECIAL_TOKENS)}, the special tokens, and the text's characters"
        )
    check_file("--output", Path(output) / "vocab.txt", InputPaths(expand_globs(inputs)))
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            *SPECIAL_TOKENS,
            *_characters(backend, training_parts(backend, read_texts(expand_globs(inputs), keys))),
        ],
        continuing_subword_prefix=CONTINUATION_PREFIX,
        limit_alphabet=MAX_ALPHABET,
        show_progress=False,
    )
    backend.train_from_iterator(training_parts(backend, read_texts(expand_globs(inputs), keys)), trainer)
    learned = backend.get_vocab().keys() - set(SPECIAL_TOKENS)
    pieces = [*SPECIAL_TOKENS, *sorted(learned, key=lambda piece: (len(piece.removeprefix(CONTINUATION_PREFIX)) > 1, piece))]
    if len(pieces) > vocab_size:
        raise DataError(f"--vocab-size {vocab_size}: at least {len(pieces)}, this text's characters and the special tokens")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "vocab.txt", "\n".join(pieces) + "\n")
    return len(pieces)


def _characters(backend: Backend, texts: Iterable[str]) -> list[str]:
    """Return the most frequent characters, sorted: those that begin words, then, with `##`, those that continue them."""
    begin, inside = Counter[str](), Counter[str]()
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            begin[word[0]] += 1
            inside.update(word[1:])
    # Ties are broken by the character, so that the result does not depend on the order of the texts.
    frequent = {c for c, _ in sorted((begin + inside).items(), key=lambda item: (-item[1], item[0]))[:MAX_ALPHABET]}
    return sorted(frequent & begin.keys()) + [CONTINUATION_PREFIX + c for c in sorted(frequent & inside.keys())]
