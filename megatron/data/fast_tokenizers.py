"""Tokenizers that the `tokenizers` package runs: GPT-2 BPE, BERT WordPiece, and any tokenizer.json."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from megatron.config.option import MAX_TOKENS
from megatron.data.cuts import Seam
from megatron.data.errors import DataError
from megatron.data.fast_cuts import fast_seam
from megatron.data.slow_patterns import check_patterns, failures_as_data_errors, panics_as_data_errors
from megatron.data.tokenizer_base import END_OF_TEXT, HugeIdError, Tokenizer, read_tokenizer_file
from megatron.files.regular import parse_json

# Usual names of the end-of-document token, for files that do not state which token it is.
USUAL_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<EOD>", "[EOS]")


class FastTokenizer(Tokenizer):
    """A tokenizer that the `tokenizers` package runs."""

    def __init__(self, backend: Backend, special: Mapping[str, int], assets: Mapping[str, bytes], extra_ids: int = 0) -> None:
        # A tokenizer.json may enable both, which would change the ids of a corpus.
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.special, self.assets, self.extra_ids = backend, special, assets, extra_ids
        self._vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self._vocab_size > MAX_TOKENS:
            raise HugeIdError(f"the id of a token is {self._vocab_size - 1:,}, which makes no sense: at most {MAX_TOKENS:,}")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text; a long text is tokenized in parts."""
        with failures_as_data_errors(self.kind):
            return [i for part in self.parts(text) for i in self._backend.encode(part, add_special_tokens=False).ids]

    @cached_property
    def seam(self) -> Seam | None:
        """The seam that follows from the steps of the backend; None if they are not all known to be local."""
        return fast_seam(self._backend)

    def tokenize_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, tokenized as a batch on the backend's threads."""
        with failures_as_data_errors(self.kind):
            return [list(e.ids) for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @property
    def special_in_text(self) -> Mapping[str, int]:
        """Ids of the added tokens that are special, by their text."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def read_special_as_text(self) -> None:
        """Tokenize special tokens in texts like any other text; DataError if the model itself still produces their ids."""
        self._backend.encode_special_tokens = True
        unknown = getattr(self._backend.model, "unk_token", None)
        for token, token_id in self.special_in_text.items():
            if token != unknown and token_id in self.tokenize(token):
                raise DataError(
                    f"--special-tokens-in-text plain: {self.kind} cannot do that with this vocabulary: its model turns "
                    f"{token!r} in a text into its id; remove it from the texts, or leave the flag out"
                )

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of these ids, as the backend's decoder joins it."""
        with failures_as_data_errors(self.kind):
            return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def piece(self, token_id: int) -> str:
        """Return the token with this id; "" if there is none."""
        return str(self._backend.id_to_token(token_id) or "")

    def backend(self) -> Backend:
        """Return the tokenizer of the `tokenizers` package."""
        return self._backend


class GPT2BPETokenizer(FastTokenizer):
    """GPT-2's byte-level BPE from vocab.json and merges.txt; `<|endoftext|>` ends documents, and is recognized in texts."""

    kind = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        assets = {
            "vocab.json": read_tokenizer_file(vocab_file, "--vocab-file"),
            "merges.txt": read_tokenizer_file(merge_file, "--merge-file"),
        }
        try:
            vocab = parse_json(assets["vocab.json"])
            lines = assets["merges.txt"].decode("utf-8").split("\n")
            pairs = (line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version"))
            merges = [(left, right) for left, right in pairs]
            backend = Backend(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
        except Exception as error:  # `tokenizers` raises plain Exceptions
            raise DataError(f"{vocab_file} and {merge_file} are not vocab.json and merges.txt of GPT-2 BPE: {error}") from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2 adds no space before a text
        backend.decoder = decoders.ByteLevel()
        special = {}
        if END_OF_TEXT in vocab:
            backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
            special = dict.fromkeys(("eod", "bos", "eos", "unk"), int(vocab[END_OF_TEXT]))
        super().__init__(backend, special, assets)


def read_word_pieces(vocab_file: str, flag: str) -> dict[str, int]:
    """Return the word pieces of BERT's vocab.txt with their ids; DataError that names the flag if the file is invalid."""
    try:
        words = read_tokenizer_file(vocab_file, flag).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{vocab_file} is not a vocab.txt of BERT: {error}") from error
    vocab = {word.rstrip("\r"): token_id for token_id, word in enumerate(words[:-1] if words[-1] == "" else words)}
    missing = [t for t in ("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]") if t not in vocab]
    if missing:
        raise DataError(f"{vocab_file} is not a vocab.txt of BERT: it lacks {', '.join(missing)}")
    return vocab


def word_piece_backend(
    vocab: Mapping[str, int],
    *,
    lower_case: bool,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
    max_word: int = 200,
) -> Backend:
    """Return BERT's WordPiece (arXiv 1810.04805) over a vocabulary; it recognizes no special tokens in texts.

    Args:
        vocab: maps words to ids, with `[UNK]`, `[CLS]` and `[SEP]`.
        lower_case: convert texts to lower case.
        strip_accents: remove accents; None removes them if `lower_case` is set.
        chinese_characters: make each Chinese character a word of its own.
        max_word: maximum number of characters of a word; longer words become `[UNK]`.
    """
    backend = Backend(models.WordPiece(dict(vocab), unk_token="[UNK]", max_input_chars_per_word=max_word))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=lower_case, strip_accents=strip_accents, handle_chinese_chars=chinese_characters
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return backend


class BertWordPieceTokenizer(FastTokenizer):
    """BERT's WordPiece from vocab.txt, plus `[BOS]`, `[EOS]` and `<extra_id_N>` at the end, as Megatron-LM adds them."""

    lower_case: ClassVar[bool]

    def __init__(self, vocab_file: str, extra_ids: int) -> None:
        assets = {"vocab.txt": read_tokenizer_file(vocab_file, "--vocab-file")}
        vocab = read_word_pieces(vocab_file, "--vocab-file")
        added = [t for t in ("[BOS]", "[EOS]", *(f"<extra_id_{i}>" for i in range(extra_ids))) if t not in vocab]
        vocab |= {token: len(vocab) + i for i, token in enumerate(added)}
        backend = word_piece_backend(vocab, lower_case=self.lower_case)
        names = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *added)
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in names])
        special = {role: vocab[f"[{role.upper()}]"] for role in ("unk", "cls", "sep", "pad", "mask", "bos", "eos")}
        super().__init__(backend, special, assets, extra_ids)


class BertWordPieceLowerCase(BertWordPieceTokenizer):
    """BERT's word pieces of text in lower case, without accents."""

    kind, lower_case = "BertWordPieceLowerCase", True


class BertWordPieceCase(BertWordPieceTokenizer):
    """BERT's word pieces of text with case and accents."""

    kind, lower_case = "BertWordPieceCase", False


def _flags_for_older_form(directory: Path) -> str | None:
    """Return the flags for a directory's tokenizer in a form older than tokenizer.json; None if it has none."""
    forms = {
        "tokenizer.model": f"--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model {directory / 'tokenizer.model'}",
        "merges.txt": f"--tokenizer-type GPT2BPETokenizer --vocab-file {directory / 'vocab.json'} --merge-file "
        f"{directory / 'merges.txt'}",
        "vocab.txt": f"--tokenizer-type BertWordPieceLowerCase (or ...Case) --vocab-file {directory / 'vocab.txt'}",
    }
    return next((flags for name, flags in forms.items() if os.path.lexists(directory / name)), None)


class HuggingFaceTokenizer(FastTokenizer):
    """Any tokenizer.json; the files beside it, tokenizer_config.json and special_tokens_map.json, name its special tokens."""

    kind = "HuggingFaceTokenizer"

    def __init__(self, path: str) -> None:
        file = Path(path) / "tokenizer.json" if os.path.isdir(path) else Path(path)
        if os.path.isdir(path) and not os.path.lexists(file) and (flags := _flags_for_older_form(Path(path))):
            raise DataError(f"--tokenizer-model {path} has no tokenizer.json but an older form: give {flags}")
        data = read_tokenizer_file(str(file), "--tokenizer-model")
        try:
            with panics_as_data_errors(str(file)):
                backend = Backend.from_str(data.decode("utf-8"))
        except DataError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exceptions
            raise DataError(f"{file} is not a tokenizer.json: {error}") from error
        check_patterns(backend, str(file))
        config_files = {name: file.parent / name for name in ("special_tokens_map.json", "tokenizer_config.json")}
        assets = {
            "tokenizer.json": data,
            **{
                name: read_tokenizer_file(str(config_file), "--tokenizer-model")
                for name, config_file in config_files.items()
                if os.path.lexists(config_file)
            },
        }
        self._config: dict[str, Any] = {}
        for name, config_file in config_files.items():
            try:
                self._config |= parse_json(assets.get(name, b"{}"))
            except (ValueError, TypeError) as error:
                raise DataError(f"{config_file} is not a JSON object: {error}") from error
        special: dict[str, int] = {}
        for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
            entry = self._config.get(f"{role}_token")
            token_id = backend.token_to_id(str(entry.get("content") if isinstance(entry, dict) else entry)) if entry else None
            if token_id is not None:
                special[role] = token_id
        # The end-of-sequence token ends documents too; if no file names it, the first usual name in the vocabulary does.
        ends = [special.get("eos"), *map(backend.token_to_id, USUAL_ENDS)]
        end = next((token_id for token_id in ends if token_id is not None), None)
        super().__init__(backend, special if end is None else {**special, "eod": end}, assets)

    def identity(self) -> dict[str, Any]:
        """Return the identity without the digests of the files beside tokenizer.json."""
        # The files beside tokenizer.json matter only through the special tokens that they name.
        identity = super().identity()
        return {**identity, "files": {"tokenizer.json": identity["files"]["tokenizer.json"]}}

    def hf_extras(self) -> dict[str, Any]:
        """Return the chat template, if there is one."""
        return {key: self._config[key] for key in ("chat_template",) if key in self._config}
