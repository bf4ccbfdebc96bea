"""Compare the model of a checkpoint with the model of a run that starts from it."""

from __future__ import annotations

from dataclasses import fields

from megatron.config.errors import Problem
from megatron.config.options import by_name, flag_text
from megatron.config.schema import ModelSettings

# Settings that affect neither the shape nor the meaning of a weight, so a run may change them.
MAY_DIFFER = {
    "attention_dropout",
    "hidden_dropout",
    "fused_attention_dropout",
    "init_method_std",
    "init_method_xavier_uniform",
    "make_vocab_size_divisible_by",
}
HEAD_FIELDS = {"task_head", "labels"}  # `head_differences` compares these, because fine-tuning may add a head


def model_differences(saved: ModelSettings, requested: ModelSettings, source: str) -> list[Problem]:
    """Return one problem for each setting, except those of the head, in which a checkpoint's model and a run's model differ.

    Args:
        saved: the checkpoint's model.
        requested: the run's model; its vocabulary size is not compared if it is None.
        source: the checkpoint's path, for messages.
    """
    problems = []
    for field in fields(ModelSettings):
        old, new = getattr(saved, field.name), getattr(requested, field.name)
        if field.name in MAY_DIFFER | HEAD_FIELDS or old == new or (field.name == "vocab_size" and new is None):
            continue
        # No flag sets the next two, so their messages name the tokenizer and the architecture instead.
        if field.name == "vocab_size":
            problems.append(Problem(f"the tokenizer's {new} tokens", f"do not fit {source}, which was trained with {old}"))
            continue
        if field.name == "architecture":
            problems.append(Problem(f"a {new.upper()}", f"cannot start from {source}, which holds a {old.upper()}"))
            continue
        option = by_name()[f"model.{field.name}"]
        rule, legal = f"does not fit {source}, which was made with {old}", str(old)
        if option.kind is bool:  # the flag has no value: it sets False if it is an off_flag, else True
            given = new is not (option.flag == option.off_flag)
            rule = f"is {'given' if given else 'not given'}, and {source} was made {'without' if given else 'with'} it"
            legal = "without it" if given else "with it"
        problems.append(Problem(flag_text(option.name, new), rule, f"{legal}; --use-checkpoint-args takes them all"))
    return problems


def head_differences(saved: ModelSettings, requested: ModelSettings, source: str, *, may_add_head: bool) -> list[Problem]:
    """Return a problem if a checkpoint's model does not have the requested head. At most one is returned.

    Args:
        saved: the checkpoint's model.
        requested: the run's model.
        source: the checkpoint's path, for messages.
        may_add_head: a pretrained model may get a task head with initial weights, because the run trains it.
    """
    if saved.architecture != requested.architecture:  # reported by `model_differences`
        return []
    if saved.task_head is None and requested.task_head is not None:
        rule = f"is in none of the weights of {source}, which were pretrained and not fine-tuned"
        legal = "fine-tune them with --pretrained-checkpoint, --train-data and --epochs"
        return [] if may_add_head else [Problem(f"a head for {requested.task_head}", rule, legal)]
    # A run without labels takes the checkpoint's.
    if saved.task_head == requested.task_head and requested.labels in (saved.labels, ()):
        return []
    return [
        Problem(
            f"a model for {_describe_head(requested)}",
            f"cannot start from {source}, which was fine-tuned for {_describe_head(saved)}",
        )
    ]


def _describe_head(model: ModelSettings) -> str:
    """Return the purpose of a model's head, for messages: "pretraining", or the kind of task head and its labels."""
    if model.task_head is None:
        return "pretraining"
    return model.task_head + (f" ({', '.join(model.labels)})" if model.labels else "")
