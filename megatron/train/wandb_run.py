"""Choose the Weights & Biases run that a slice of training writes to, so that W&B contains each iteration once.

W&B's history is append-only. The points that an interrupted slice logged after its checkpoint are not logged again, since the
same settings give the same values. If the settings have changed, the values differ, so a new W&B run is started, which names
the old one as its parent.
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
# The sections of settings that affect the logged values, and prefixes of those in them that do not.
SECTIONS = ("model", "data", "batch", "optim", "precision")
IGNORED = ("num_workers", "data_cache_path", "micro_batch_size", "compile", "stop_file", "exit_", "train_")
SCHEDULE_SETTINGS = (
    "lr",
    "min_lr",
    "weight_decay",
    "start_weight_decay",
    "end_weight_decay",
    "override_opt",
    "use_checkpoint_opt",
)


@dataclass(frozen=True)
class WandbRun:
    """A W&B run, and the newest points in it.

    Attributes:
        id: W&B's id of the run; "" if there is none.
        iteration: iteration of the newest training point.
        evaluations: iteration of the newest evaluation, by split.
        parent: id of the run with other settings that this one was forked from; "" if there is none.
        fork: the iteration after which it was forked.
        settings: the digest of the settings that the points were made with; see `settings_digest`.
    """

    id: str = ""
    iteration: int = 0
    evaluations: dict[str, int] = field(default_factory=dict)
    parent: str = ""
    fork: int = 0
    settings: str = ""

    def write(self, path: Path) -> None:
        """Write the record to a file beside the checkpoints. Raise OSError if it cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self)) + "\n")


def read_wandb_run(path: Path | None) -> WandbRun:
    """Read the record of the previous slice; return an empty one if the file is missing or invalid."""
    values: Any = None
    if path is not None:
        with suppress(OSError, ValueError):
            values = read_json(path)
    empty = asdict(WandbRun())
    # Types are compared exactly, since bool is a subclass of int.
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
    compared: dict[str, Any] = {
        section: {k: v for k, v in values[section].items() if not k.startswith(IGNORED)} for section in SECTIONS
    }
    # `schedule` replaces these settings: a resumed run may keep the schedule of its checkpoint in spite of them.
    compared["optim"] = {k: v for k, v in compared["optim"].items() if not k.startswith(SCHEDULE_SETTINGS)}
    text = json.dumps([compared, dict(schedule)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def choose_wandb_run(saved_id: str, iteration: int, record: WandbRun, settings: str) -> WandbRun:
    """Choose the W&B run of a slice that resumes after an iteration.

    Args:
        saved_id: the W&B id in the checkpoint; "" if there is none.
        iteration: the iteration that the slice resumes after.
        record: the record of the previous slice, from `read_wandb_run`.
        settings: the digest of this slice's settings, from `settings_digest`.

    Returns:
        The W&B run of the previous slice, with its newest points; or a new run, with the one of the checkpoint as its parent.
    """
    # The recorded run is that of the checkpoint, or a fork that an earlier slice made from it at this very iteration.
    continuous = record.id and (record.id == saved_id or (record.parent == saved_id and record.fork == iteration))
    if continuous and (record.iteration <= iteration or record.settings == settings):
        return replace(record, settings=settings)
    if saved_id and not record.id:  # the record is lost; W&B itself ignores points that it has already
        return WandbRun(saved_id, iteration, settings=settings)
    return WandbRun(secrets.token_hex(4), iteration, parent=saved_id, fork=iteration if saved_id else 0, settings=settings)
