"""The type of a family: all that is known of one form in which models are published in Hugging Face, as data.

A family is a file with one value of `HFFamily`, and its row in table.py. Import, export, their comparison with transformers and
the messages of all of them read the value alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.interop.tensor_mapping import Row

NUMBER = int | float
# Endings of constants that older versions of transformers saved beside the weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".embeddings.position_ids")


@dataclass(frozen=True)
class Field:
    """A field of config.json. null is legal where the default is None.

    kind: the types that transformers accepts for it. ours: the name of the same setting here, where one exists.
    fixed: the default is the only value that the model here has.
    """

    kind: type | UnionType
    default: Any
    ours: str | None = None
    fixed: bool = False


def is_gpt(config: ModelConfig) -> bool:
    """Return whether the model is a GPT."""
    return config.architecture == "gpt"


@dataclass(frozen=True)
class HFClass:
    """A class of transformers: its name, the table of its tensors, and whether it is for this kind of model at all."""

    architecture: str
    rows: tuple[Row, ...]
    serves: Callable[[ModelConfig], bool] = is_gpt

    def table(self, config: ModelConfig) -> Iterator[Row]:
        """Yield the rows with the layers' numbers put in."""
        for row in self.rows:
            if "{n}" in row.ours:
                yield from (row.at(n) for n in range(config.num_layers))
            else:
                yield row


Found = dict[str, Tensor]
ChooseClass = Callable[[ModelConfig, Found, Mapping[str, Any]], tuple[ModelConfig, HFClass]]


@dataclass(frozen=True, kw_only=True)
class HFFamily:
    """A family of models in Hugging Face's form, in both directions.

    Attributes:
        model_type: its name in config.json.
        classes: its classes in transformers. The first that serves a configuration is written.
        fields: every field of config.json that the classes compute with, `tie_word_embeddings` among them, with the class's
            default, which an absent field has.
        aliases: other names of fields, which transformers takes for them.
        causal: what `is_causal` in config.json may say.
        settings: our settings that follow from more than one field, given the fields' values and the whole config.json.
            CheckpointError for what the model here does not have.
        config: the fields of config.json that a configuration of ours becomes.
        unsupported: what of a configuration the family cannot express, in words.
        unwritten: our settings that it has no field for, though a model may train with them, each with a sentence that says so.
        written: whether models are exported as this family; False where another one that is listed says the same.
        choose: which class a directory was saved from, and what its tensors say of the configuration; of the tensors it may
            take out what means nothing. None for the first class.
        prefix: of the tensors' names; a directory that holds the model without its head lacks it.
        heads: prefixes of names that such a directory has as they are.
        copies: a tensor that transformers ties to another -> that other one.
        constants: endings of names that hold no weights.
    """

    model_type: str
    classes: tuple[HFClass, ...]
    fields: Mapping[str, Field]
    aliases: Mapping[str, str] = field(default_factory=dict)
    causal: bool = True
    settings: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    config: Callable[[ModelConfig], dict[str, Any]]
    unsupported: Callable[[ModelConfig], list[str]]
    unwritten: Mapping[str, str] = field(default_factory=dict)
    written: bool = True
    choose: ChooseClass | None = None
    prefix: str
    heads: tuple[str, ...] = ("lm_head.", "cls.")
    copies: Mapping[str, str] = field(default_factory=dict)
    constants: tuple[str, ...] = CONSTANTS

    def serves(self, config: ModelConfig) -> bool:
        """Return whether one of the classes is for this kind of model."""
        return any(found.serves(config) for found in self.classes)

    def written_class(self, config: ModelConfig) -> HFClass:
        """Return the class that a model is written as. ValueError where none is for its kind."""
        for found in self.classes:
            if found.serves(config):
                return found
        raise ValueError(f"the family {self.model_type} has no class for this kind of model")

    def expresses(self, config: ModelConfig) -> bool:
        """Return whether a model can be exported as this family."""
        return self.written and self.serves(config) and not self.unsupported(config)

    def class_of(self, config: ModelConfig, found: Found, about: Mapping[str, Any]) -> tuple[ModelConfig, HFClass]:
        """Return the class that a directory was saved from, and the configuration with what its tensors say.

        Args:
            config: resolved, as config.json describes it.
            found: the directory's tensors, by their names there.
            about: config.json.

        Raises:
            CheckpointError: where the tensors are none that the model here can have.
        """
        return (config, self.classes[0]) if self.choose is None else self.choose(config, found, about)

    def table(self, config: ModelConfig) -> Iterator[Row]:
        """Yield the rows of the class that a model is written as, with the layers' numbers put in."""
        return self.written_class(config).table(config)

    def rounded(self, weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights as they come back after they were written in `dtype`, under our names.

        Args:
            weights: under our names, whole; all of them have a row in the table.
            config: resolved.
            dtype: of the tensors that are written.
        """
        rows = {row.ours: row for row in self.table(config)}
        back = {}
        for name, tensor in weights.items():
            written = rows[name].form.write(tensor, config)
            back[name] = rows[name].form.read(tuple(t.to(dtype).to(tensor.dtype) for t in written), config)
        return back
