"""The numbers of configurations that strangers made, looked at before anything is computed from them.

A width of 10**30 ends in an overflow somewhere, a million heads in a loop that never ends, and a NaN in a model of NaNs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from megatron.checkpoint.layout import CheckpointError

MAX_COUNT, MAX_SIZE, MAX_WHOLE = 1 << 16, 1 << 31, 1 << 63
MAX_WORD = 10_000  # characters
# Of how many something there is one after the other, and how wide something is: the names of Hugging Face and of Megatron-LM.
COUNTS = frozenset(
    {
        *("n_layer", "n_head", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("num_layers", "encoder_num_layers", "num_query_groups"),
    }
)
SIZES = frozenset(
    {
        *("vocab_size", "n_positions", "max_position_embeddings", "n_embd", "hidden_size", "n_inner", "intermediate_size"),
        *("head_dim", "type_vocab_size", "padded_vocab_size", "true_vocab_size", "seq_length", "ffn_hidden_size"),
        *("kv_channels", "make_vocab_size_divisible_by"),
    }
)
SWITCHES = frozenset(
    {
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "scale_attn_weights", "is_decoder", "add_cross_attention"),
        "scale_attn_by_inverse_layer_idx",
    }
)


def check_config(about: Mapping[str, Any], where: str) -> None:
    """CheckpointError for a value in a config.json that no model has. where: the file, for the message."""
    of = f" of {PurePath(where).name}"
    _check_sizes(about, where, of)
    for name, value in about.items():
        table = value if isinstance(value, dict) else {name: value}
        for key, held in table.items():
            field = f"`{name}`{of}" if table is not value else f"`{key}` of `{name}`{of}"
            if isinstance(held, float) and not math.isfinite(held):
                raise CheckpointError(f"{where}: {field} is {held}, which is no number to compute with")
            if isinstance(held, int) and abs(held) >= MAX_WHOLE:
                raise CheckpointError(f"{where}: {field} is {shown(held)}, which makes no sense")
            if isinstance(held, str) and len(held) > MAX_WORD:
                raise CheckpointError(f"{where}: {field} is a text of {len(held):,} characters, which makes no sense")
        if name in SWITCHES and value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{where}: `{name}`{of} is {shown(value)}; it must be true or false")
        if name == "architectures" and value is not None and not _words(value):
            raise CheckpointError(f"{where}: `{name}`{of} is {shown(value)}; it must be a list of names")


def check_args(args: Mapping[str, Any], where: str) -> None:
    """CheckpointError for a size in a file's args that is too large for any model. where: the file, for the message."""
    for name, value in args.items():
        most = MAX_COUNT if name in COUNTS else MAX_SIZE
        if name not in COUNTS | SIZES or not isinstance(value, int | float):
            continue
        if not value <= most:  # NaN is not
            raise CheckpointError(f"{where}: `{name}` is {shown(value)}, which makes no sense: it may be at most {most:,}")


def _check_sizes(values: Mapping[str, Any], where: str, of: str) -> None:
    """CheckpointError for a size that is no whole number, or one that no model has. An absent one and null pass.

    where, of: what stands before and after the name of a size in the message.
    """
    for name, value in values.items():
        most = MAX_COUNT if name in COUNTS else MAX_SIZE if name in SIZES else None
        if most is None or value is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            rule = f"it must be a whole number from 1 to {most:,}"
            raise CheckpointError(f"{where}: `{name}`{of} is {shown(value)}, which makes no sense: {rule}")


def shown(value: object) -> str:
    """A value in a message: a line of it. Python refuses to print numbers of many digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
