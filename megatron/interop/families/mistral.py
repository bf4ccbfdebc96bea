"""Mistral, read alone: without a sliding window its weights are a Llama's, as which they are exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from megatron.interop.families.family import Field
from megatron.interop.families.llama import FIELDS_LIKE_LLAMA, LLAMA, settings_like_llama

FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **FIELDS_LIKE_LLAMA,
        "intermediate_size": Field(int, 14336, "ffn_hidden_size"),
        "num_key_value_heads": Field(int, 8, "num_query_groups"),
        "max_position_embeddings": Field(int, 131072, "max_position_embeddings"),
        "sliding_window": Field(int | None, 4096),
    }
)

MISTRAL = replace(LLAMA, model_type="mistral", fields=FIELDS, settings=settings_like_llama, written=False)
