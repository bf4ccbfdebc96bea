"""Schema of a run's configuration: frozen dataclasses, the one source of defaults, flags, help, TOML keys and saved settings.

The schema has two types. `RunSettings` contains the settings of a user, from flags, TOML or a saved file; `None` means that a
setting is to be derived. `RunConfig` contains the settings of a run: every derived setting has a value, which type checkers
know. `resolve.py` converts the first to the second.

Each section is a file of this folder, with its dataclass, the function that derives settings from others, and its rules. Each
field is declared with `option(default, help, ...)`, which also states the legal range of a number. `command_line/` derives
flags and TOML keys from fields: `tensor_model_parallel_size` of `LayoutSettings` is the flag `--tensor-model-parallel-size`
and the key `tensor-model-parallel-size` under `[layout]`. Names, defaults and meanings are those of Megatron-LM 23.06 where it
has the setting. A section with derived settings has two dataclasses: `LayoutSettings` with all fields, and its subclass
`LayoutConfig`, which declares those that a run always has again, without a default and without `None`.

Imports no torch, so that a configuration can be read, checked and printed on any machine.
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
    """Settings of a run as a user gave them. Each field is a section, which is a table in a TOML file."""

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
    """Build settings from a mapping `section.field` -> value. Fields that it lacks get the schema's defaults."""
    built = {}
    for section, config in sections().items():
        fields = {name.split(".")[1]: value for name, value in values.items() if name.startswith(section + ".")}
        built[section] = config(**fields)
    return RunSettings(**built)
