"""Schema of a run's configuration: frozen dataclasses, the one source of defaults, flags, help, TOML and the saved config.

It has two types. `RunSettings` holds what a user gave, by flags, TOML or a saved file; `None` means "derive it".
`RunConfig` holds what a run uses: every derived setting has its value, and a type checker knows it. `resolve.py` makes the
second from the first.

Each section is a file of this folder: its dataclass with the legal range of every number, the function that derives settings
from others, and its rules. Each field is written with `option(default, help, ...)`, from which `command_line/` derives all that
a user types: the field `tensor_model_parallel_size` of `LayoutSettings` is the flag `--tensor-model-parallel-size`, and in TOML
the key `tensor-model-parallel-size` under `[layout]`. Names, defaults and meanings are Megatron-LM 23.06's where it has the
setting. A section with something to derive has two dataclasses: `LayoutSettings` with all fields, and `LayoutConfig`, which
inherits them and declares again, without a default and without `None`, those that a run always has.

Imports no torch: a configuration can be read, checked and printed anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from megatron.config.batch import BatchConfig, BatchSettings
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig, DataSettings
from megatron.config.eval import EvalConfig
from megatron.config.layout import LayoutConfig, LayoutSettings
from megatron.config.log import LogConfig
from megatron.config.memory import MemoryConfig
from megatron.config.model import ModelConfig, ModelSettings
from megatron.config.optim import OptimConfig, OptimSettings
from megatron.config.precision import PrecisionConfig
from megatron.config.task import TaskConfig
from megatron.config.tokenizer import TokenizerConfig

__all__ = [
    "BatchConfig",
    "BatchSettings",
    "CheckpointConfig",
    "DataConfig",
    "DataSettings",
    "EvalConfig",
    "LayoutConfig",
    "LayoutSettings",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "ModelSettings",
    "OptimConfig",
    "OptimSettings",
    "PrecisionConfig",
    "RunConfig",
    "RunSettings",
    "TaskConfig",
    "TokenizerConfig",
    "assemble",
    "sections",
]


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run as a user gave them. The sections are the tables of a TOML file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    layout: LayoutSettings = field(default_factory=LayoutSettings)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """Resolved configuration of a run: every derived setting has its value."""

    model: ModelConfig = field()
    layout: LayoutConfig = field()
    data: DataConfig = field()
    batch: BatchConfig = field()
    optim: OptimConfig = field()


def sections() -> dict[str, type]:
    """Return the name and the dataclass of every section of a run's settings, in order."""
    return dict(get_type_hints(RunSettings))


def assemble(values: Mapping[str, Any]) -> RunSettings:
    """Build settings from values by `section.field`; what they leave out has the schema's default."""
    built = {}
    for section, config in sections().items():
        own = {name.split(".")[1]: v for name, v in values.items() if name.startswith(section + ".")}
        built[section] = config(**own)
    return RunSettings(**built)
