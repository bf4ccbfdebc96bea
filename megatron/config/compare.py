"""Whether a checkpoint holds the model that a run asks for."""

from __future__ import annotations

from dataclasses import fields

from megatron.config.errors import Problem
from megatron.config.options import by_name, flag_text
from megatron.config.schema import ModelSettings

# Settings that change no shape and no meaning of a weight: a run that loads a checkpoint may choose them anew.
MAY_DIFFER = {
    "attention_dropout",
    "hidden_dropout",
    "fused_attention_dropout",
    "init_method_std",
    "init_method_xavier_uniform",
    "make_vocab_size_divisible_by",
}
HEAD = {"task_head", "labels"}


def model_differences(held: ModelSettings, wanted: ModelSettings, source: str) -> list[Problem]:
    """One problem for each setting in which the model in a checkpoint differs from the wanted one.

    source: names the checkpoint. A vocabulary that is not known yet is not compared.
    """
    problems = []
    for field in fields(ModelSettings):
        there, here = getattr(held, field.name), getattr(wanted, field.name)
        if field.name in MAY_DIFFER | HEAD or there == here or (field.name == "vocab_size" and here is None):
            continue
        if field.name == "vocab_size":
            problems.append(Problem(f"the tokenizer's {here} tokens", f"do not fit {source}, which was trained with {there}"))
            continue
        if field.name == "architecture":
            problems.append(Problem(f"a {here.upper()}", f"cannot start from {source}, which holds a {there.upper()}"))
            continue
        option = by_name()[f"model.{field.name}"]
        rule, legal = f"does not fit {source}, which was made with {there}", str(there)
        if option.kind is bool:  # its flag may be the one that turns it off
            given = here is not (option.flag == option.off)
            rule = f"is {'given' if given else 'not given'}, and {source} was made {'without' if given else 'with'} it"
            legal = "without it" if given else "with it"
        problems.append(Problem(flag_text(option.name, here), rule, f"{legal}; --use-checkpoint-args takes them all"))
    return problems


def head_differences(held: ModelSettings, wanted: ModelSettings, source: str, *, new: bool) -> list[Problem]:
    """A problem where the head in a checkpoint is not the wanted one.

    new: whether the run may give a pretrained model the head of a task, with initial weights: when it goes on to train it.
    """
    if held.architecture != wanted.architecture:  # that is said elsewhere
        return []
    if held.task_head is None and wanted.task_head is not None:
        rule = f"is in none of the weights of {source}, which were pretrained and not fine-tuned"
        legal = "fine-tune them with --pretrained-checkpoint, --train-data and --epochs"
        return [] if new else [Problem(f"a head for {wanted.task_head}", rule, legal)]
    there, here = ((model.task_head, model.labels) for model in (held, wanted))
    if there == here or (there[0] == here[0] and not here[1]):
        return []
    return [Problem(f"a model for {_kind(wanted)}", f"cannot start from {source}, which was fine-tuned for {_kind(held)}")]


def _kind(model: ModelSettings) -> str:
    if model.task_head is None:
        return "pretraining"
    return model.task_head + (f" ({', '.join(model.labels)})" if model.labels else "")
