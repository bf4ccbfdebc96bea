"""What a model's samples are, and how they become micro-batches: the one place that tells GPT's data from BERT's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema import DataConfig, ModelConfig
from megatron.data.batch import GPTBatches
from megatron.data.bert_batch import BertBatches
from megatron.data.build import MakeSamples, gpt_samples, pair_rules, pair_samples
from megatron.data.loader import MakeBatch
from megatron.data.mock import MakeMock, bert_roles, mock_bert, mock_gpt
from megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """samples: of one dataset. batches: of some samples. mock: samples that are made up; None without --mock-data."""

    samples: MakeSamples
    batches: MakeBatch
    mock: MakeMock | None = None


def recipe_of(model: ModelConfig, data: DataConfig, seed: int, tokenizer: Tokenizer) -> Recipe:
    """Of a resolved model. DataError when the tokenizer lacks what the samples need."""
    if model.architecture == "gpt":
        batches = GPTBatches.of(data, tokenizer.vocab_size, tokenizer.special.get("eod"))
        made_up = mock_gpt(tokenizer, data.seq_length, seed) if data.mock_data else None
        return Recipe(gpt_samples(data, seed), batches, made_up)
    token = bert_roles(tokenizer).__getitem__ if data.mock_data else tokenizer.token
    rules = pair_rules(data, seed, tokenizer, token, binary=model.bert_binary_head)
    batches_of_pairs = BertBatches(data.seq_length, token("pad"), model.bert_binary_head)
    return Recipe(pair_samples(rules), batches_of_pairs, mock_bert(tokenizer, rules) if data.mock_data else None)
