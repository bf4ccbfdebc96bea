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
            self._own = int(self._model.get_piece_size())  # ids of the model; those above are added here
            self._pieces = [str(self._model.id_to_piece(i)) for i in range(self._own)]
            if not self._pieces:
                raise ValueError("it is empty")
        except Exception as error:  # the package raises several kinds
            raise DataError(f"{model_file} is not a SentencePiece model: {error}") from error
        own = {role: int(getattr(self._model, f"{role}_id")()) for role in ("unk", "bos", "eos", "pad")}
        self.special = {role: number for role, number in own.items() if number >= 0}
        if "eos" in self.special:
            self.special = {**self.special, "eod": self.special["eos"]}

    @property
    def vocab_size(self) -> int:
        """The number of pieces, added ones included."""
        return len(self._pieces)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text; a long text is encoded in parts."""
        return [i for part in self.parts(text) for i in self._model.encode_as_ids(part)]

    @cached_property
    def seam(self) -> Seam | None:
        """Finds the places where long texts can be cut; None if the model allows none."""
        known = cuts_are_safe(self.assets["tokenizer.model"])
        return BPESeam(self._model, self._pieces[: self._own], self.added_tokens()) if known else None

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of these ids; ids that are not the model's own add nothing."""
        return str(self._model.decode_ids([number for number in ids if number < self._own]))

    def piece(self, number: int) -> str:
        """Return the piece with this id; "" where there is none."""
        return self._pieces[number] if number < len(self._pieces) else ""

    @property
    def special_in_text(self) -> Mapping[str, int]:
        """User-defined pieces, which the model finds in text first."""
        return self._symbols()

    def _symbols(self) -> Mapping[str, int]:
        """Return the pieces that the model itself finds in text before anything else, without runs of white space."""
        entries = (
            dict(protobuf_fields(value)) for field, value in protobuf_fields(self.assets["tokenizer.model"]) if field == 1
        )
        found = [number for number, entry in enumerate(entries) if entry.get(3) == USER_DEFINED]
        return {p: n for n in found if (p := self._pieces[n]).strip(f"{SPACE} \n\t\r")}

    def read_special_as_text(self) -> None:
        """Raise a DataError if the model has user-defined pieces, which it always finds in texts; otherwise do nothing."""
        if own := self._symbols():
            names = ", ".join(map(repr, list(own)[:4]))
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

    Tokens that the model has already keep their ids. All of them are recognized in texts.
    """

    kind = "SentencePieceTokenizer"

    def __init__(self, model_file: str, extra_ids: int) -> None:
        super().__init__(model_file)
        self.extra_ids = extra_ids
        names = {"cls": "<CLS>", "sep": "<SEP>", "eod": "<EOD>", "mask": "<MASK>"}
        names |= {r: self._pieces[self.special[r]] if r in self.special else f"<{r.upper()}>" for r in ("pad", "bos", "eos")}
        ids = {piece: number for number, piece in enumerate(self._pieces)}
        self._known: dict[str, int] = {}
        for name in (*names.values(), *(f"<extra_id_{i}>" for i in range(extra_ids))):
            if name not in ids:
                ids[name] = len(self._pieces)
                self._pieces.append(name)
            self._known[name] = ids[name]
        self._special_is_text = False
        # In parentheses, so that splitting keeps the tokens.
        self._cut = re.compile("(" + "|".join(map(re.escape, self._known)) + ")")
        self.special = {**self.special, **{role: self._known[name] for role, name in names.items()}}

    @property
    def special_in_text(self) -> Mapping[str, int]:
        """User-defined pieces of the model, and the added tokens."""
        return {**self._symbols(), **self._known}

    def read_special_as_text(self) -> None:
        """Tokenize the added tokens in texts as any other text."""
        super().read_special_as_text()
        self._special_is_text = True

    def added_tokens(self) -> list[str]:
        """Return the tokens that Megatron-LM adds, whether or not the model has them."""
        return list(self._known)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, in which the added tokens are found first."""
        if self._special_is_text:
            return super().tokenize(text)
        ids: list[int] = []
        for whole in self.parts(text):
            for part in filter(None, self._cut.split(whole)):  # each a known token or free of them
                ids += [self._known[part]] if part in self._known else self._model.encode_as_ids(part)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of these ids; an added token appears by name, with a space after it."""
        names = {number: name for name, number in self._known.items()}
        parts: list[str] = []
        plain: list[int] = []
        for number in ids:
            if number in names:
                parts += [super().detokenize(plain), names[number] + " "]
                plain = []
            else:
                plain.append(number)
        return "".join([*parts, super().detokenize(plain)])


class BPESeam(Seam):
    """Cuts texts for a BPE model: where no piece of the vocabulary holds the two characters that are parted.

    A merge across the place would make such a piece. Known tokens, which are found in text first, must not be near.
    """

    def __init__(self, model: Any, pieces: Sequence[str], known: Sequence[str]) -> None:
        self._model, self._pieces = model, frozenset(pieces)
        self._neighbours = adjacent_pairs(piece.replace(" ", SPACE) for piece in pieces)
        self._known = TokenFinder(known)
        self.context = max(self.context, self._known.longest + 2)

    def judge(self, left: str, right: str) -> int | None:
        """Allow for a cut where both sides, normalized alone, are the whole, and no merge crosses the place."""
        if self._known(left + right):
            return None
        whole, before = str(self._model.normalize(left + right)), str(self._model.normalize(left))
        for skipped in (0, 1) if right[0].isspace() else (0,):
            after = str(self._model.normalize(right[skipped:]))
            if before and after and before + after == whole and self._can_part(before[-1], after[0]):
                return skipped
        return None

    def _can_part(self, before: str, after: str) -> bool:
        """Return whether no merge can join these two characters, and none of them is spelt in bytes."""
        known = before in self._pieces and after in self._pieces and before + after not in self._neighbours
        return known and before.isalnum() and after in SEPARATORS


def cuts_are_safe(proto: bytes) -> bool:
    """Return whether a serialised ModelProto is a BPE model with one of the usual normalizations, which are local.

    A unigram model adds up the scores of a whole text: how the sums round decides where two orders of the same pieces score
    alike (`** ****` or `**** **`), so that no place is safe.
    """
    parts = dict(protobuf_fields(proto))
    # 2 is trainer_spec, 3 normalizer_spec of ModelProto.
    trainer, norm = dict(protobuf_fields(parts.get(2, b""))), dict(protobuf_fields(parts.get(3, b"")))
    usual = norm.get(1, b"") in (b"identity", b"nfkc", b"nfkc_cf", b"nmt_nfkc", b"nmt_nfkc_cf")
    escapes_spaces, spaces_as_suffixes = norm.get(5, 1), trainer.get(24, 0)
    return bool(trainer.get(3, UNIGRAM) == BPE and usual and escapes_spaces and not spaces_as_suffixes)


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the (number, value) pairs of a serialised protocol buffer: ints for varints, bytes for the rest."""
    stream = io.BytesIO(message)

    def varint() -> int:  # seven bits in each byte, the lowest first; the eighth says that more follow
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
                raise DataError(f"the SentencePiece model has a field of unknown form {wire}")


def convert_sentence_piece(proto: bytes, model: Any, pieces: list[str], scores: list[float], added: list[str]) -> Backend:
    """Return a SentencePiece model as a tokenizer of the `tokenizers` package.

    The two break ties differently where a unigram model scores two orders of the same pieces alike (`** ****` or `**** **`).

    Args:
        proto: the serialised ModelProto, of which trainer_spec (2) and normalizer_spec (3) are read.
        model: the SentencePieceProcessor of it.
        pieces: the pieces by id, those of the model and then the added ones.
        scores: scores of the model's pieces.
        added: tokens of `pieces` that are found in a text first.

    Raises:
        DataError: for a word or character model, and for one that writes spaces as suffixes.
    """
    parts = dict(protobuf_fields(proto))
    trainer, norm = dict(protobuf_fields(parts.get(2, b""))), dict(protobuf_fields(parts.get(3, b"")))
    if trainer.get(24, 0):
        raise DataError("this SentencePiece model writes spaces as suffixes, which tokenizer.json cannot express")
    kind, byte_fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
    vocab = {piece: number for number, piece in enumerate(pieces[: len(scores)])}
    unknown = int(model.unk_id())
    if kind == UNIGRAM:
        core: Any = models.Unigram(list(zip(pieces, scores, strict=False)), unk_id=unknown, byte_fallback=byte_fallback)
    elif kind == BPE:
        core = models.BPE(
            vocab=vocab,
            merges=list(bpe_merges(vocab, scores)),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    else:
        raise DataError("only unigram and BPE models of SentencePiece can be written as a tokenizer.json")
    backend = Backend(core)
    # The steps of SentencePiece's own normalizer, in its order.
    steps: list[Any] = []
    if norm.get(2):
        steps.append(normalizers.Precompiled(norm[2]))
    if norm.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = bool(norm.get(3, 1))  # add_dummy_prefix: a space before each text
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
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
    """Yield the merges of a BPE model, which SentencePiece leaves implicit: best score of the result first."""
    order: list[tuple[float, int, int, str, str]] = []
    for piece, number in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                order.append((-scores[number], vocab[left], vocab[right], left, right))
    for *_, left, right in sorted(order):
        yield left, right
