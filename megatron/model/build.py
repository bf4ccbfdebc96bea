"""Build the model that a configuration describes: the pipeline stages of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron.config.schema import ModelConfig
from megatron.contract import StagePart
from megatron.model.bert import Bert
from megatron.model.gpt import GPT
from megatron.model.task_heads import FineTuned
from megatron.model.transformer import Transformer
from megatron.parallel.tensor_parallel import TensorParallel

MODELS: Mapping[str, type[Transformer]] = MappingProxyType({"gpt": GPT, "bert": Bert})


def model_class(config: ModelConfig) -> type[Transformer]:
    """Return the class of the model that a configuration describes."""
    return MODELS[config.architecture] if config.task_head is None else FineTuned


def build_stages(
    config: ModelConfig, placement: Sequence[int], parts: Sequence[StagePart], tp: TensorParallel, rank: int, **options: Any
) -> dict[int, Transformer]:
    """Return the stages of a pipeline rank by their number, with uninitialised parameters.

    Args:
        config: resolved, with vocab_size set.
        placement: the pipeline rank of each stage.
        parts: the layers of each stage, and whether it has embedding and heads.
        tp: the tensor-parallel ranks.
        rank: the pipeline rank.
        options: further arguments of `Transformer`, the same for every stage.
    """
    model, stages = model_class(config), dict[int, Transformer]()
    for number, part in enumerate(parts):
        if placement[number] == rank:
            # A tied output layer on the same rank as the embedding shares its matrix instead of having a copy.
            first = stages[0].embedding if 0 in stages else None
            word = None if first is None else first.word.weight
            stages[number] = model(config, part, tp, word=word, **options)
    return stages
