"""The shares of a dataset that --split names."""

from __future__ import annotations

import re
from math import inf


def split_shares(split: str) -> list[float]:
    """Shares of training, validation and test documents, as typed: `969,30,1`, `969/30/1` or `[969, 30, 1]`.

    Quotes around it, which a shell script leaves where it quotes twice, are no part of it, as for Megatron-LM.
    Raises ValueError where these are not one to three shares, none negative and not all zero.
    """
    words = re.split(r"[,/\s]+", split.strip("'\"[]() \t,"))
    shares = [float(word) for word in words]
    if not (1 <= len(shares) <= 3 and all(0 <= share < inf for share in shares) and sum(shares) > 0):
        raise ValueError("give up to three shares, of training, validation and test, as in 969,30,1")
    return shares
