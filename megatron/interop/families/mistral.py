"""Mistral, for import only: without a sliding window it computes the same as Llama, and is exported as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from megatron.interop.families.family import ConfigField
from megatron.interop.families.llama import FIELDS_LIKE_LLAMA, LLAMA, settings_like_llama

FIELDS: Mapping[str, ConfigField] = MappingProxyType(
    {
        **FIELDS_LIKE_LLAMA,
        "intermediate_size": ConfigField(int, 14336, "ffn_hidden_size"),
        "num_key_value_heads": ConfigField(int, 8, "num_query_groups"),
        "max_position_embeddings": ConfigField(int, 131072, "max_position_embeddings"),
        "sliding_window": ConfigField(int | None, 4096),
    }
)

MISTRAL = replace(LLAMA, model_type="mistral", fields=FIELDS, to_settings=settings_like_llama, exported=False)
