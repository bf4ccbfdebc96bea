"""A WordPiece vocabulary from text, for BERT: pieces are merged as BPE merges them, within words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron.data.corpus import expand
from megatron.data.errors import DataError
from megatron.data.train_bpe import texts

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUES = "##"
MOST_CHARACTERS = 1000  # the commonest; a word with another one is unknown


def train_wordpiece(inputs: Sequence[str], keys: Sequence[str], vocab_size: int, output: str, *, lower_case: bool) -> int:
    """Write vocab.txt to a directory, one piece a line; returns the number of its lines.

    Special tokens come first, then single characters, then longer pieces, both sorted: the order in which pieces are merged
    differs from one training to the next where two are equally common.
    Raises DataError for wrong input, and for a size that does not hold every character.
    """
    if vocab_size < len(SPECIAL):
        raise DataError(f"--vocab-size {vocab_size}: at least {len(SPECIAL)}, the special tokens, and the text's characters")
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        continuing_subword_prefix=CONTINUES,
        limit_alphabet=MOST_CHARACTERS,
        show_progress=False,
    )
    backend.train_from_iterator(texts(expand(inputs), keys), trainer)
    learned = backend.get_vocab().keys() - set(SPECIAL)
    pieces = [*SPECIAL, *sorted(learned, key=lambda piece: (len(piece.removeprefix(CONTINUES)) > 1, piece))]
    if len(pieces) > vocab_size:
        raise DataError(f"--vocab-size {vocab_size}: at least {len(pieces)}, this text's characters and the special tokens")
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write the vocabulary to {output}: {error}") from error
    return len(pieces)
