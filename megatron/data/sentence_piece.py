"""Read SentencePiece models, and convert them to a tokenizer.json (arXiv 1808.06226)."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from megatron.data.cuts import SEPARATORS, SPACE, Seam, TokenFinder, adjacent_pairs
from megatron.data.errors import DataError
from megatron.data.tokenizer_base import Tokenizer, read_tokenizer_file

# Numbers of sentencepiece_model.proto.
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
USER_DEFINED = 4  # ModelProto.SentencePiece.Type


class GPTSentencePieceTokenizer(Tokenizer):
    """A SentencePiece model without added tokens; its `</s>` ends a document."""

    kind = "GPTSentencePieceTokenizer"

    def __init__(self, model_file: str) -> None:
        self.assets = {"tokenizer.model": read_tokenizer_file(model_file, "--tokenizer-model")}
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.assets["tokenizer.model"])
            self._own = int(self._model.get_piece_size())  # number of the model's own ids; larger ids are added tokens
            self._pieces = [str(self._model.id_to_piece(i)) for i in range(self._own)]
            if not self._pieces:
                raise ValueError("it is empty")
        except Exception as error:  # the package raises several kinds of exceptions
            raise DataError(f"{model_file} is not a SentencePiece model: {error}") from error
        own = {role: int(getattr(self._model, f"{role}_id")()) for role in ("unk", "bos", "eos", "pad")}
        self.special = {role: token_id for role, token_id in own.items() if token_id >= 0}
        if "eos" in self.special:
            self.special = {**self.special, "eod": self.special["eos"]}

    @property
    def vocab_size(self) -> int:
        """The number of pieces, added tokens included."""
        return len(self._pieces)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text; a long text is encoded in parts."""
        return [i for part in self.parts(text) for i in self._model.encode_as_ids(part)]

    @cached_property
    def seam(self) -> Seam | None:
        """The seam for cutting long texts; None if they cannot be cut safely for this model."""
        is_safe = cuts_are_safe(self.assets["tokenizer.model"])
        return BPESeam(self._model, self._pieces[: self._own], self.added_tokens()) if is_safe else None

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of these ids, without those that are not the model's own."""
        return str(self._model.decode_ids([token_id for token_id in ids if token_id < self._own]))

    def piece(self, token_id: int) -> str:
        """Return the piece with this id; "" if there is none."""
        return self._pieces[token_id] if token_id < len(self._pieces) else ""

    @property
    def special_in_text(self) -> Mapping[str, int]:
        """Ids of the user-defined pieces, which the model finds in a text before it encodes the rest."""
        return self._user_defined_pieces()

    def _user_defined_pieces(self) -> Mapping[str, int]:
        """Return the ids of the user-defined pieces, except those of white space only."""
        entries = (
            dict(protobuf_fields(value))
            for field, value in protobuf_fields(self.assets["tokenizer.model"])
            if field == 1  # pieces
        )
        ids = [token_id for token_id, entry in enumerate(entries) if entry.get(3) == USER_DEFINED]  # field 3 is the type
        return {piece: token_id for token_id in ids if (piece := self._pieces[token_id]).strip(f"{SPACE} \n\t\r")}

    def read_special_as_text(self) -> None:
        """Raise a DataError if the model has user-defined pieces, since it always finds them in texts."""
        if pieces := self._user_defined_pieces():
            names = ", ".join(map(repr, list(pieces)[:4]))
            raise DataError(
                f"--special-tokens-in-text plain: this SentencePiece model itself finds {names} in texts; use its "
                "tokenizer.json with --tokenizer-type HuggingFaceTokenizer, or leave the flag out"
            )

    def added_tokens(self) -> list[str]:
        """Return the added tokens, which are found in a text before the model encodes the rest."""
        return []

    def backend(self) -> Backend:
        """Return the model converted to the `tokenizers` package."""
        scores = [float(self._model.get_score(i)) for i in range(self._model.get_piece_size())]
        return convert_sentence_piece(self.assets["tokenizer.model"], self._model, self._pieces, scores, self.added_tokens())


class SentencePieceTokenizer(GPTSentencePieceTokenizer):
    """A SentencePiece model with `<CLS>`, `<SEP>`, `<EOD>`, `<MASK>` and `<extra_id_N>`, added as Megatron-LM adds them.

    Those that the model already has keep their ids. All of them are recognized in texts.
    """

    kind = "SentencePieceTokenizer"

    def __init__(self, model_file: str, extra_ids: int) -> None:
        super().__init__(model_file)
        self.extra_ids = extra_ids
        names = {"cls": "<CLS>", "sep": "<SEP>", "eod": "<EOD>", "mask": "<MASK>"}
        names |= {r: self._pieces[self.special[r]] if r in self.special else f"<{r.upper()}>" for r in ("pad", "bos", "eos")}
        ids = {piece: token_id for token_id, piece in enumerate(self._pieces)}
        self._added: dict[str, int] = {}
        for name in (*names.values(), *(f"<extra_id_{i}>" for i in range(extra_ids))):
            if name not in ids:
                ids[name] = len(self._pieces)
                self._pieces.append(name)
            self._added[name] = ids[name]
        self._special_is_text = False
        # With a group, so that split() also returns the tokens.
        self._token_pattern = re.compile("(" + "|".join(map(re.escape, self._added)) + ")")
        self.special = {**self.special, **{role: self._added[name] for role, name in names.items()}}

    @property
    def special_in_text(self) -> Mapping[str, int]:
        """Ids of the user-defined pieces of the model and of the added tokens."""
        return {**self._user_defined_pieces(), **self._added}

    def read_special_as_text(self) -> None:
        """Tokenize the added tokens in texts like any other text; DataError if the model has user-defined pieces."""
        super().read_special_as_text()
        self._special_is_text = True

    def added_tokens(self) -> list[str]:
        """Return the tokens that Megatron-LM adds, including those that the model already has."""
        return list(self._added)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, in which the added tokens are found first."""
        if self._special_is_text:
            return super().tokenize(text)
        ids: list[int] = []
        for text_part in self.parts(text):
            for part in filter(None, self._token_pattern.split(text_part)):  # each is an added token, or contains none
                ids += [self._added[part]] if part in self._added else self._model.encode_as_ids(part)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of these ids; an added token appears by name, with a space after it."""
        names = {token_id: name for name, token_id in self._added.items()}
        parts: list[str] = []
        plain: list[int] = []
        for token_id in ids:
            if token_id in names:
                parts += [super().detokenize(plain), names[token_id] + " "]
                plain = []
            else:
                plain.append(token_id)
        return "".join([*parts, super().detokenize(plain)])


class BPESeam(Seam):
    """Cuts texts for a BPE model, where no piece of the vocabulary contains the two characters next to the cut side by side.

    A merge across the cut would form such a piece. Added tokens, which are found in a text first, must not be near.

    Args:
        model: the SentencePieceProcessor.
        pieces: the pieces of its vocabulary.
        added: the added tokens.
    """

    def __init__(self, model: Any, pieces: Sequence[str], added: Sequence[str]) -> None:
        self._model, self._pieces = model, frozenset(pieces)
        self._neighbours = adjacent_pairs(piece.replace(" ", SPACE) for piece in pieces)
        self._added = TokenFinder(added)
        self.context = max(self.context, self._added.longest + 2)

    def judge(self, left: str, right: str) -> int | None:
        """Allow a cut where both sides, normalized alone, give the normalized whole, and no merge crosses the cut."""
        if self._added(left + right):
            return None
        normalized, before = str(self._model.normalize(left + right)), str(self._model.normalize(left))
        for skipped in (0, 1) if right[0].isspace() else (0,):
            after = str(self._model.normalize(right[skipped:]))
            if before and after and before + after == normalized and self._can_cut_between(before[-1], after[0]):
                return skipped
        return None

    def _can_cut_between(self, before: str, after: str) -> bool:
        """Return whether no merge can join these two characters, and both are pieces themselves, not encoded as bytes."""
        is_separate = before in self._pieces and after in self._pieces and before + after not in self._neighbours
        return is_separate and before.isalnum() and after in SEPARATORS


def cuts_are_safe(proto: bytes) -> bool:
    """Return whether a serialised ModelProto is a BPE model with one of the usual, local normalizations.

    A unigram model adds up the scores of a whole text. Where two orders of the same pieces have equal scores (`** ****` or
    `**** **`), rounding decides between them, so that no cut is safe.
    """
    parts = dict(protobuf_fields(proto))
    # Field 2 of ModelProto is trainer_spec, field 3 normalizer_spec.
    trainer, norm = dict(protobuf_fields(parts.get(2, b""))), dict(protobuf_fields(parts.get(3, b"")))
    usual = norm.get(1, b"") in (b"identity", b"nfkc", b"nfkc_cf", b"nmt_nfkc", b"nmt_nfkc_cf")
    escapes_spaces, spaces_as_suffixes = norm.get(5, 1), trainer.get(24, 0)
    return bool(trainer.get(3, UNIGRAM) == BPE and usual and escapes_spaces and not spaces_as_suffixes)


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the (field number, value) pairs of a serialised protocol buffer; values are ints for varints, else bytes."""
    stream = io.BytesIO(message)

    def varint() -> int:  # seven bits per byte, lowest first; the eighth bit is set if more bytes follow
        value = shift = 0
        while True:
            byte = stream.read(1)
            if not byte:
                raise DataError("the SentencePiece model is truncated")
            value |= (byte[0] & 0x7F) << shift
            shift += 7
            if byte[0] < 0x80:
                return value

    while stream.tell() < len(message):
        key = varint()
        match key & 7:  # wire type
            case 0:
                yield key >> 3, varint()
            case 1:
                yield key >> 3, stream.read(8)
            case 2:
                yield key >> 3, stream.read(varint())
            case 5:
                yield key >> 3, stream.read(4)
            case wire:
                raise DataError(f"the SentencePiece model has a field of unknown wire type {wire}")


def convert_sentence_piece(proto: bytes, model: Any, pieces: list[str], scores: list[float], added: list[str]) -> Backend:
    """Return a SentencePiece model as a tokenizer of the `tokenizers` package.

    They break ties differently if two orders of the same pieces have equal scores in a unigram model (`** ****`, `**** **`).

    Args:
        proto: the serialised ModelProto.
        model: the SentencePieceProcessor of the same model.
        pieces: the pieces by id: those of the model, then the added tokens.
        scores: scores of the model's pieces.
        added: tokens of `pieces` that are found in a text first.

    Raises:
        DataError: if it is a word or character model, or writes spaces as suffixes.
    """
    parts = dict(protobuf_fields(proto))
    trainer, norm = dict(protobuf_fields(parts.get(2, b""))), dict(protobuf_fields(parts.get(3, b"")))
    if trainer.get(24, 0):
        raise DataError("this SentencePiece model writes spaces as suffixes, which tokenizer.json cannot express")
    kind, byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
    vocab = {piece: token_id for token_id, piece in enumerate(pieces[: len(scores)])}
    unknown = int(model.unk_id())
    if kind == UNIGRAM:
        converted: Any = models.Unigram(list(zip(pieces, scores, strict=False)), unk_id=unknown, byte_fallback=byte_fallback)
    elif kind == BPE:
        converted = models.BPE(
            vocab=vocab,
            merges=list(bpe_merges(vocab, scores)),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        raise DataError("only unigram and BPE models of SentencePiece can be written as a tokenizer.json")
    backend = Backend(converted)
    # The steps of SentencePiece's own normalizer, in its order.
    steps: list[Any] = []
    if norm.get(2):
        steps.append(normalizers.Precompiled(norm[2]))
    if norm.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    adds_prefix = bool(norm.get(3, 1))  # add_dummy_prefix: a space before each text
    steps += [normalizers.Prepend(SPACE)] if adds_prefix else []
    steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if adds_prefix else []),
        ]
    )
    entries = [dict(protobuf_fields(value)) for field, value in protobuf_fields(proto) if field == 1]
    in_text = [pieces[i] for i, entry in enumerate(entries) if entry.get(3) == USER_DEFINED]
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in in_text])
    control = [pieces[i] for i in range(len(scores)) if model.is_control(i) or i == unknown]
    names = [*dict.fromkeys([*control, *added])]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return backend


def bpe_merges(vocab: dict[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """Yield the merges of a BPE model, which SentencePiece does not store, by descending score of the merged piece."""
    order: list[tuple[float, int, int, str, str]] = []
    for piece, token_id in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                order.append((-scores[token_id], vocab[left], vocab[right], left, right))
    for *_, left, right in sorted(order):
        yield left, right
