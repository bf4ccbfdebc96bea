"""Choose the Weights & Biases run that a slice of training writes to, so that W&B holds each iteration once. Pure.

W&B's history is append-only. The points that an interrupted slice logged after its checkpoint are not logged again, since the
same settings give the same values. When the settings have changed, the values differ: a new W&B run begins, which names the old
one as its parent.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron.config.command_line.saved import to_json
from megatron.config.schema import RunConfig
from megatron.files.pending import write_whole
from megatron.files.regular import read_json

WANDB_FILE = "wandb.json"  # in --save
# The sections that decide the logged values, and settings in them that do not: they say how the run computes or when it stops.
SECTIONS = ("model", "data", "batch", "optim", "precision")
WITHOUT_EFFECT = ("num_workers", "data_cache_path", "micro_batch_size", "compile", "stop_file", "exit_", "train_")
SCHEDULED = ("lr", "min_lr", "weight_decay", "start_weight_decay", "end_weight_decay", "override_opt", "use_checkpoint_opt")


@dataclass(frozen=True)
class WandbRun:
    """A W&B run, and the newest points in it.

    Attributes:
        id: W&B's id of the run; "" for none.
        iteration: iteration of the newest training point.
        evaluations: iteration of the newest evaluation, by split.
        parent: id of the run that this one was forked from, with other settings; "" for none.
        fork: the iteration of the fork.
        settings: the digest of the settings that the points were made with; see `settings_digest`.
    """

    id: str = ""
    iteration: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)
    parent: str = ""
    fork: int = 0
    settings: str = ""

    def write(self, path: Path) -> None:
        """Write the record to a file beside the checkpoints. OSError when the disk refuses."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self)) + "\n")


def read_wandb_run(path: Path | None) -> WandbRun:
    """Read the record of the slice before; return an empty one when there is no file, or it cannot be read."""
    values: Any = None
    if path is not None:
        with suppress(OSError, ValueError):
            values = read_json(path)
    empty = asdict(WandbRun())
    # bool is a kind of int, so types are compared exactly.
    if not isinstance(values, dict) or any(type(values.get(name)) is not type(value) for name, value in empty.items()):
        return WandbRun()
    if not all(type(number) is int for number in values["evaluations"].values()):
        return WandbRun()
    return WandbRun(**{each.name: values[each.name] for each in fields(WandbRun)})


def settings_digest(config: RunConfig, schedule: Mapping[str, Any]) -> str:
    """Return a digest of all settings that change what is logged.

    Args:
        config: the resolved configuration.
        schedule: the fields of the learning-rate schedule in use.
    """
    values = to_json(config)
    kept: dict[str, Any] = {
        section: {k: v for k, v in values[section].items() if not k.startswith(WITHOUT_EFFECT)} for section in SECTIONS
    }
    # `schedule` stands for these flags: a resumed run may keep its checkpoint's schedule in spite of them.
    kept["optim"] = {k: v for k, v in kept["optim"].items() if not k.startswith(SCHEDULED)}
    text = json.dumps([kept, dict(schedule)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_wandb_run(held: str, iteration: int, kept: WandbRun, settings: str) -> WandbRun:
    """Choose the W&B run of a slice that resumes after an iteration.

    Args:
        held: the W&B id in the checkpoint; "" for none.
        iteration: the iteration that the slice resumes after.
        kept: the record of the slice before, from `read_wandb_run`.
        settings: the digest of this slice's settings, from `settings_digest`.

    Returns:
        The W&B run of the slice before, with its newest points; or a new one that has it as its parent.
    """
    # The same run as in the checkpoint, or the fork that an earlier slice made from it at this very iteration.
    followed = kept.id and (kept.id == held or (kept.parent == held and kept.fork == iteration))
    if followed and (kept.iteration <= iteration or kept.settings == settings):
        return replace(kept, settings=settings)
    if held and not kept.id:  # the file is lost: W&B itself leaves out points that it has
        return WandbRun(held, iteration, settings=settings)
    return WandbRun(secrets.token_hex(4), iteration, parent=held, fork=iteration if held else 0, settings=settings)
