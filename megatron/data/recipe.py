"""What a model's samples are, and how they become micro-batches: the one place that tells GPT's data from BERT's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema import DataConfig, ModelConfig
from megatron.data.batch import GPTCollator
from megatron.data.bert_batch import BertCollator
from megatron.data.build import MakeDataset, build_pair_rules, gpt_dataset_maker, pair_dataset_maker
from megatron.data.loader import Collate
from megatron.data.mock import MakeMock, bert_roles, mock_bert, mock_gpt
from megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """samples: of one dataset. batches: of some samples. mock: samples that are made up; None without --mock-data."""

    samples: MakeDataset
    batches: Collate
    mock: MakeMock | None = None


def build_recipe(model: ModelConfig, data: DataConfig, seed: int, tokenizer: Tokenizer) -> Recipe:
    """Of a resolved model. DataError when the tokenizer lacks what the samples need."""
    if model.architecture == "gpt":
        batches = GPTCollator.of(data, tokenizer.vocab_size, tokenizer.special.get("eod"))
        made_up = mock_gpt(tokenizer, data.seq_length, seed) if data.mock_data else None
        return Recipe(gpt_dataset_maker(data, seed), batches, made_up)
    token = bert_roles(tokenizer).__getitem__ if data.mock_data else tokenizer.token
    rules = build_pair_rules(data, seed, tokenizer, token, binary=model.bert_binary_head)
    batches_of_pairs = BertCollator(data.seq_length, token("pad"), model.bert_binary_head)
    return Recipe(pair_dataset_maker(rules), batches_of_pairs, mock_bert(tokenizer, rules) if data.mock_data else None)
