"""Compare the model of a checkpoint with the model of a run that starts from it."""

from __future__ import annotations

from dataclasses import fields

from megatron.config.errors import Problem
from megatron.config.options import by_name, flag_text
from megatron.config.schema import ModelSettings

# These change neither the shape nor the meaning of a weight, so a run may differ from its checkpoint in them.
MAY_DIFFER = {
    "attention_dropout",
    "hidden_dropout",
    "fused_attention_dropout",
    "init_method_std",
    "init_method_xavier_uniform",
    "make_vocab_size_divisible_by",
}
HEAD_FIELDS = {"task_head", "labels"}  # compared by `head_differences`: fine-tuning replaces the pretraining heads


def model_differences(saved: ModelSettings, requested: ModelSettings, source: str) -> list[Problem]:
    """Return one problem for each setting in which a checkpoint's model differs from the requested one.

    Args:
        saved: the checkpoint's model.
        requested: the run's model; its vocabulary size is not compared while it is None.
        source: the checkpoint's path, for messages.
    """
    problems = []
    for field in fields(ModelSettings):
        there, here = getattr(saved, field.name), getattr(requested, field.name)
        if field.name in MAY_DIFFER | HEAD_FIELDS or there == here or (field.name == "vocab_size" and here is None):
            continue
        # No flag sets these two, so the messages name what does: the tokenizer and the program.
        if field.name == "vocab_size":
            problems.append(Problem(f"the tokenizer's {here} tokens", f"do not fit {source}, which was trained with {there}"))
            continue
        if field.name == "architecture":
            problems.append(Problem(f"a {here.upper()}", f"cannot start from {source}, which holds a {there.upper()}"))
            continue
        option = by_name()[f"model.{field.name}"]
        rule, legal = f"does not fit {source}, which was made with {there}", str(there)
        if option.kind is bool:  # a flag without a value; for a default of True it is the one that turns it off
            given = here is not (option.flag == option.off_flag)
            rule = f"is {'given' if given else 'not given'}, and {source} was made {'without' if given else 'with'} it"
            legal = "without it" if given else "with it"
        problems.append(Problem(flag_text(option.name, here), rule, f"{legal}; --use-checkpoint-args takes them all"))
    return problems


def head_differences(saved: ModelSettings, requested: ModelSettings, source: str, *, new: bool) -> list[Problem]:
    """Return a problem if the head of a checkpoint's model is not the requested one.

    Args:
        saved: the checkpoint's model.
        requested: the run's model.
        source: the checkpoint's path, for messages.
        new: the run trains, so it may give a pretrained model a task head with initial weights.
    """
    if saved.architecture != requested.architecture:  # which `model_differences` reports
        return []
    if saved.task_head is None and requested.task_head is not None:
        rule = f"is in none of the weights of {source}, which were pretrained and not fine-tuned"
        legal = "fine-tune them with --pretrained-checkpoint, --train-data and --epochs"
        return [] if new else [Problem(f"a head for {requested.task_head}", rule, legal)]
    there, here = ((model.task_head, model.labels) for model in (saved, requested))
    # A task may leave its labels open until its files are read; those of the checkpoint are then taken.
    if there == here or (there[0] == here[0] and not here[1]):
        return []
    return [
        Problem(
            f"a model for {_describe_head(requested)}",
            f"cannot start from {source}, which was fine-tuned for {_describe_head(saved)}",
        )
    ]


def _describe_head(model: ModelSettings) -> str:
    if model.task_head is None:
        return "pretraining"
    return model.task_head + (f" ({', '.join(model.labels)})" if model.labels else "")
