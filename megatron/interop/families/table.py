"""The families that can be imported and exported, by the `model_type` of their config.json.

A package outside this one adds a family by an entry point of the group `megatron.families`, in its pyproject.toml:

    [project.entry-points."megatron.families"]
    toy_llama = "my_package.toy_llama:TOY_LLAMA"

TOY_LLAMA is an `HFFamily`, and the entry point's name is its `model_type`, which must not be that of a built-in family. The
package is imported only when the family is used, or when no built-in family can express a model that is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from types import MappingProxyType

from megatron.config.entry_points import load_entry, with_installed
from megatron.config.schema import ModelConfig
from megatron.interop.families.family import HFFamily
from megatron.interop.families.gpt2 import GPT2
from megatron.interop.families.llama import LLAMA
from megatron.interop.families.megatron_bert import MEGATRON_BERT
from megatron.interop.families.mistral import MISTRAL

GROUP = "megatron.families"

BUILT_IN: Mapping[str, HFFamily] = MappingProxyType(
    {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, MEGATRON_BERT)}
)
FAMILIES: Mapping[str, HFFamily | EntryPoint] = with_installed(BUILT_IN, GROUP)
# Families that cannot be imported, each with the reason.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "bert": "whose layer norms follow each sublayer; here they precede it, as in 'megatron-bert', so weights of the one do "
        "not work in the other"
    }
)


def family_named(model_type: str) -> HFFamily:
    """Return the family of a `model_type`. ValueError if it is unknown, or its package does not define it correctly."""
    if model_type not in FAMILIES:
        if model_type in REFUSED:
            raise ValueError(f"`model_type` is {model_type!r}, {REFUSED[model_type]}")
        raise ValueError(f"`model_type` is {model_type!r}; known are {', '.join(sorted(FAMILIES))}")
    entry = FAMILIES[model_type]
    if isinstance(entry, HFFamily):
        return entry
    try:
        family = load_entry(entry)
    except ValueError as error:
        raise ValueError(f"the family {model_type} {error}") from error
    if not isinstance(family, HFFamily) or family.model_type != model_type:
        raise ValueError(f"the family {model_type} needs {entry.value}, which is not an HFFamily of this model_type")
    return family


def family_for_export(config: ModelConfig, model_type: str | None = None) -> HFFamily:
    """Return the family that a model is exported as: `model_type` if it can express the model, else the first that can.

    Args:
        config: the resolved configuration.
        model_type: the family that the model was imported from, None without one.

    Raises:
        ValueError: no family can express the model; the message gives all reasons.
    """
    if model_type is not None and model_type in FAMILIES and (family := family_named(model_type)).expresses(config):
        return family
    reasons: dict[str, str] = {}
    for name in FAMILIES:
        family = family_named(name)
        if family.expresses(config):
            return family
        if family.exported and family.serves(config):
            reasons[family.exported_class(config).architecture] = ", ".join(family.unsupported(config))
    listed = "; ".join(f"{architecture} cannot express {why}" for architecture, why in reasons.items())
    raise ValueError(f"no Hugging Face family has this architecture: {listed}")
