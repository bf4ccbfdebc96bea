"""Texts for tests, the same on every Python: pages of a manual, made of words.

Nothing here is the interpreter's own, and of `random` only `Random.random()` is used, whose sequence no version may change.
"""

from __future__ import annotations

from random import Random

VOCABULARY = (
    "the of a is to in and for are that be an it as or with if by not on this which can at one from when may all has its "
    "other name value list number type class object method function argument string module statement expression operator "
    "default call return result element key index range slice loop import file path line block scope global local attribute "
    "instance base error exception handler table token letter digit space comment indent clause target body order left "
    "right first second last next empty single double mutable hidden given same different special built simple compound "
    "positional keyword optional reserved nested shared shallow deep evaluate assign bind raise catch define declare delete "
    "iterate compare convert format parse match yield await lookup resolve inherit override customise document describe "
    "specify"
)
WORDS = VOCABULARY.split()
COMMON = 33
ENDINGS = ("", "", "", "s", "ed", "ing", "er", "able", "ment")
HEADS = ("Notes on", "How to use", "More about", "Rules for", "Examples of", "History of", "Don't forget")


class _Writer:
    def __init__(self, seed: int) -> None:
        self.chance = Random(seed).random

    def below(self, stop: int) -> int:
        return int(self.chance() * stop)

    def word(self) -> str:
        """Draw a word. Common words are common: half of all are of the first few, which take no endings."""
        if self.chance() < 0.5:
            return WORDS[self.below(COMMON)]
        return WORDS[COMMON + self.below(len(WORDS) - COMMON)] + ENDINGS[self.below(len(ENDINGS))]

    def sentence(self) -> str:
        words = [self.word() for _ in range(4 + self.below(14))]
        if self.chance() < 0.4:
            words[len(words) // 2] += ","
        if self.chance() < 0.3:
            words[-1] = f"``{words[-1]}()``"
        if self.chance() < 0.2:
            words[1] = f"{self.below(3000) / 10}" if self.chance() < 0.5 else f"(see section {self.below(20)})"
        if self.chance() < 0.1:
            words[2] = "it's"
        text = " ".join(words)
        return text[0].upper() + text[1:] + (".", ".", ".", ";", ":", "!", "?")[self.below(7)]

    def paragraph(self) -> str:
        words = " ".join(self.sentence() for _ in range(2 + self.below(4))).split(" ")
        lines, line = [], ""
        for word in words:
            if len(line) + len(word) > 70:
                lines, line = [*lines, line], ""
            line = f"{line} {word}" if line else word
        return "\n".join([*lines, line])

    def code(self) -> str:
        name, other = self.word(), self.word()
        return f"   >>> {name}_{other} = [{self.below(100)}, '{other}']\n   >>> def {name}(x):\n   ...     return x[{other!r}]"

    def page(self, length: int) -> str:
        title = f"{HEADS[self.below(len(HEADS))]} {self.word()} {self.word()}"
        parts = [f"{title}\n{'*' * len(title)}"]
        while sum(map(len, parts)) < length:
            parts.append(self.code() if self.chance() < 0.2 else self.paragraph())
        return "\n\n".join(parts)[:length].rstrip()


def pages(count: int, length: int, seed: int = 0) -> list[str]:
    """Make pages of a manual, each of about `length` characters.

    Args:
        count: how many.
        length: characters that a page has at most; a few less where it would end in white space.
        seed: other seeds give other pages.

    Returns:
        The pages, no two alike.
    """
    return [_Writer(1_000_003 * seed + number).page(length) for number in range(count)]
