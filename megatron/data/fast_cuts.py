"""Find where a text can be cut for a tokenizer of the `tokenizers` package, from the tokenizer's steps.

Such a tokenizer finds added tokens, normalizes the text between them, splits it into words, and tokenizes each word by itself.
A cut does not change the tokens under three conditions: no added token is near; every step of the tokenizer is local, that is,
its output depends only on nearby characters; and the text around the cut has the same words with and without it. The first is
checked by a search, the second is known for the steps listed below, and the third is tested at each place. A word may also
continue across the cut, for tokenizers that do not split at spaces, such as Llama 2's. Then a cut is safe if the model is a BPE
and no piece of its vocabulary contains the two characters next to the cut side by side, since a merge across the cut would form
such a piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from megatron.data.cuts import MAX_PART, SEPARATORS, SPACE, Seam, TokenFinder, adjacent_pairs

LOCAL_NORMALIZERS = frozenset(
    ["BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Strip", "StripAccents"]
)
LOCAL_SPLITTERS = frozenset(
    ["BertPreTokenizer", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"]
)
# RUN matches an expression for one character or one class of characters, alone or repeated. More complex expressions may
# depend on distant characters.
CLASS = r"\[(?:[^\[\]&\\]|\\.|\[[^\[\]&]+\])+\]"
RUN = re.compile(rf"(?: \?)?(?:[^\\\[\](){{}}|.^$*+?]|\\[sSdDnrt]|\\[^\w\s]|\\p\{{\w+\}}|{CLASS})(?:\+|\{{2,\}})?")
# Alternatives of the expressions with which GPT-2, GPT-4, GPT-4o, Llama 3, Qwen and DeepSeek split text into words. None
# matches a letter or digit together with a separator after it. Only one has a lookahead, `\s+(?!\S)`, for white space.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
WORD_PATTERNS = frozenset(
    [
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", CONTRACTIONS, "'(?i:[sdmt]|ll|ve|re)"),
        *(r" ?\p{L}+", rf"{LEAD}\p{{L}}+", rf"{LEAD}[\p{{L}}\p{{M}}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"),
        *(rf"{LEAD}{UPPER}*{LOWER}+", rf"{LEAD}{UPPER}+{LOWER}*"),
        *(rf"{LEAD}{UPPER}*{LOWER}+{CONTRACTIONS}?", rf"{LEAD}{UPPER}+{LOWER}*{CONTRACTIONS}?"),
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        *(r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,2}"),
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)"),
    ]
)
PUNCTUATION_PATTERNS = frozenset(
    [
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[\p{P}\p{S}]+[\r\n]*"),
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    ]
)
WHITE_SPACE = r"\s+"
KNOWN_PATTERNS = WORD_PATTERNS | PUNCTUATION_PATTERNS | {WHITE_SPACE}


class FastSeam(Seam):
    """Cuts texts for a tokenizer whose steps are known to be local, which `fast_seam` checks."""

    def __init__(self, backend: Backend) -> None:
        self._normalizer, self._splitter = backend.normalizer, backend.pre_tokenizer
        added = backend.get_added_tokens_decoder().values()
        self._raw_tokens = TokenFinder(token.content for token in added if not token.normalized)
        # Normalizing a token may put a space before it, which is in a text only where a normalized part begins.
        self._normalized_tokens = TokenFinder(
            self._normalize(token.content).strip(f" {SPACE}") for token in added if token.normalized
        )
        self.context = max(self.context, self._raw_tokens.longest + 2, self._normalized_tokens.longest + 2)
        self._backend = backend
        first_step = next(component_steps(self._splitter), {"type": None})
        self._drops_spaces = first_step["type"] in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")

    def judge(self, left: str, right: str) -> int | None:
        """Allow a cut where no added token is near and both sides, split alone, have the words of the whole text."""
        normalized, normalized_left = self._normalize(left + right), self._normalize(left)
        has_token = self._raw_tokens(left + right) or self._normalized_tokens(normalized)
        if has_token or not self._ends_before_separator(normalized_left, normalized):
            return None
        words, left_words = self._split(normalized), self._split(normalized_left)
        # First without leaving out a character, then with: the tokenizer itself may put a space before each text.
        for skipped in (0, 1) if right[0].isspace() else (0,):
            normalized_right = self._normalize(right[skipped:])
            is_same_text = normalized_left + normalized_right == normalized
            if is_same_text and self._has_same_words(words, left_words, self._split(normalized_right)):
                return skipped
        return None

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        return self._backend.get_vocab(with_added_tokens=False) if is_plain_bpe(self._backend.model) else {}

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        return adjacent_pairs(self._vocabulary)

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _split(self, text: str) -> list[str]:
        return [text] if self._splitter is None else [word for word, _ in self._splitter.pre_tokenize_str(text)]

    def _ends_before_separator(self, left: str, text: str) -> bool:
        """Return whether the left part of a normalized text ends with a letter or digit, and a separator follows it."""
        if not left or len(left) >= len(text) or text[len(left)] not in SEPARATORS:
            return False
        return left[-1].isalnum() or (self._drops_spaces and left[-1].isspace())

    def _has_same_words(self, words: list[str], left_words: list[str], right_words: list[str]) -> bool:
        """Return whether both sides have the words of the whole text; one word may be cut where no merge can cross."""
        if words == left_words + right_words:
            return True
        if not left_words or not right_words:
            return False
        if words != [*left_words[:-1], left_words[-1] + right_words[0], *right_words[1:]]:
            return False
        left, right = left_words[-1][-1], right_words[0][0]  # the two characters next to the cut
        return left in self._vocabulary and right in self._vocabulary and left + right not in self._neighbours


def fast_seam(backend: Backend) -> Seam | None:
    """Return the seam of a tokenizer, or None if one of its steps is not known to be local."""
    try:
        is_local = all(map(_normalizes_locally, component_steps(backend.normalizer))) and _splits_locally(backend)
    except Exception:  # steps written in Python cannot be described as JSON
        return None
    tokens = backend.get_added_tokens_decoder().values()
    has_blank = any(not token.content.strip(f" {SPACE}") for token in tokens if token.normalized)
    # A token of spaces alone may occur at any place for a cut, and a very long token exceeds the context.
    if not is_local or has_blank or any(len(token.content) > MAX_PART // 8 for token in tokens):
        return None
    return FastSeam(backend)


def component_steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or a pre-tokenizer as tokenizer.json describes them, in order."""
    pending = [] if component is None else [json.loads(component.__getstate__())]
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending = [*step.get("normalizers", step.get("pretokenizers")), *pending]
        else:
            yield step


def is_plain_bpe(model: Any) -> bool:
    """Return whether a model is a BPE that forms its pieces only by merging characters."""
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return isinstance(model, models.BPE) and not any(getattr(model, name) for name in options)


def _normalizes_locally(step: Mapping[str, Any]) -> bool:
    return step["type"] in LOCAL_NORMALIZERS or (step["type"] == "Replace" and _is_class_run(step["pattern"]))


def _is_class_run(pattern: Mapping[str, str]) -> bool:
    """Return whether a pattern is one character, or matches one class of characters, alone or repeated."""
    return len(pattern.get("String", "")) == 1 or RUN.fullmatch(pattern.get("Regex", "")) is not None


def _splits_locally(backend: Backend) -> bool:
    """Return whether every splitter is local, up to the first one that always splits at the places for cuts."""
    steps = list(component_steps(backend.pre_tokenizer))
    for step in steps:
        if step["type"] == "ByteLevel":
            # It replaces the characters by others, which later steps are not checked for: it must split, or be the last step.
            return bool(step["use_regex"]) or step is steps[-1]
        expressions = _expressions(step)
        if WHITE_SPACE in expressions and expressions & PUNCTUATION_PATTERNS and expressions <= KNOWN_PATTERNS:
            return True
        is_local = expressions and (expressions <= KNOWN_PATTERNS or _is_class_run(step["pattern"]))
        if step["type"] not in LOCAL_SPLITTERS and not is_local:
            return False
    return True


def _expressions(step: Mapping[str, Any]) -> frozenset[str]:
    """Return the alternatives of a Split whose matches become words; for other steps none, or "", which is no known one."""
    if step["type"] != "Split" or step["invert"]:
        return frozenset()
    # A possessive quantifier matches the same words as the usual one.
    found = alternatives(step["pattern"].get("Regex", "")) if step["behavior"] == "Isolated" else [""]
    return frozenset(a if a in KNOWN_PATTERNS else re.sub(r"([?*+])\+", r"\1", a) for a in found)


def alternatives(expression: str) -> Iterator[str]:
    """Yield the alternatives of a regular expression, not those within its groups and classes."""
    begin = depth = 0
    in_class = False
    for match in re.finditer(r"\\.|[][()|]", expression, re.DOTALL):
        match match[0]:
            case "[":  # parentheses within a class are literal
                in_class = True
            case "]":
                in_class = False
            case "(" if not in_class:
                depth += 1
            case ")" if not in_class:
                depth -= 1
            case "|" if not in_class and not depth:
                yield expression[begin : match.start()]
                begin = match.end()
    yield expression[begin:]
