"""What a model's samples are, and how they become micro-batches: the one place that tells GPT's data from BERT's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.schema import DataConfig, ModelConfig
from megatron.data.batch import GPTBatches
from megatron.data.bert_batch import BertBatches
from megatron.data.build import MakeSamples, bert_samples, gpt_samples
from megatron.data.loader import MakeBatch
from megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """samples: of one dataset. batches: of some samples."""

    samples: MakeSamples
    batches: MakeBatch


def recipe_of(model: ModelConfig, data: DataConfig, seed: int, tokenizer: Tokenizer) -> Recipe:
    """Of a resolved model. DataError when the tokenizer lacks what the samples need."""
    if model.architecture == "gpt":
        batches = GPTBatches.of(data, tokenizer.vocab_size, tokenizer.special.get("eod"))
        return Recipe(gpt_samples(data, seed), batches)
    binary = model.bert_binary_head
    samples = bert_samples(data, seed, tokenizer, binary=binary)
    return Recipe(samples, BertBatches(data.seq_length or 0, tokenizer.token("pad"), binary))
