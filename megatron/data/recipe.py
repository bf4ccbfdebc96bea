"""Choose the kind of samples and the collator for a model, GPT or BERT."""

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
    """Functions that create a model's data.

    Attributes:
        make: creates the samples of one dataset.
        collate: turns samples into a micro-batch.
        mock: generates synthetic samples; None unless --mock-data is given.
    """

    make: MakeDataset
    collate: Collate
    mock: MakeMock | None = None


def build_recipe(model: ModelConfig, data: DataConfig, seed: int, tokenizer: Tokenizer) -> Recipe:
    """Return the functions that create a model's data.

    Args:
        model: the resolved model settings.
        data: the data settings.
        seed: seed of the run.
        tokenizer: the tokenizer, with the special tokens that the samples need.

    Raises:
        DataError: if the tokenizer lacks a token that the samples need.
    """
    if model.architecture == "gpt":
        collate = GPTCollator.from_config(data, tokenizer.vocab_size, tokenizer.special.get("eod"))
        synthetic = mock_gpt(tokenizer, data.seq_length, seed) if data.mock_data else None
        return Recipe(gpt_dataset_maker(data, seed), collate, synthetic)
    # With synthetic samples any tokenizer can be used, also one without BERT's special tokens, such as NullTokenizer.
    token = bert_roles(tokenizer).__getitem__ if data.mock_data else tokenizer.token
    rules = build_pair_rules(data, seed, tokenizer, token, binary=model.bert_binary_head)
    pair_collator = BertCollator(data.seq_length, token("pad"), model.bert_binary_head)
    return Recipe(pair_dataset_maker(rules), pair_collator, mock_bert(tokenizer, rules) if data.mock_data else None)
