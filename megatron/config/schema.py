"""What a run is: frozen dataclasses, the one source of defaults, flags, help, TOML and the saved config.

Each section is a file of this folder: its dataclass with the legal range of every number, what follows from other settings,
and its rules. Each field is written with `option(default, help, ...)`, from which `command_line/` derives all that a user
types: the field `tensor_model_parallel_size` of `LayoutConfig` is the flag `--tensor-model-parallel-size` and the TOML key
`tensor-model-parallel-size` under `[layout]`. Names, defaults and meanings are Megatron-LM 23.06's where it has the setting.
`None` means "derived": `resolve.py` fills it in.

Imports no torch: a configuration can be read, checked and printed anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from megatron.config.batch import BatchConfig
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.eval import EvalConfig
from megatron.config.layout import LayoutConfig
from megatron.config.log import LogConfig
from megatron.config.memory import MemoryConfig
from megatron.config.model import ModelConfig
from megatron.config.optim import OptimConfig
from megatron.config.precision import PrecisionConfig
from megatron.config.task import TaskConfig
from megatron.config.tokenizer import TokenizerConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LayoutConfig",
    "LogConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "RunConfig",
    "TaskConfig",
    "TokenizerConfig",
    "assemble",
    "sections",
]


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Sections are the tables of a TOML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


def sections() -> dict[str, type]:
    """Name and dataclass of every section of a run, in order."""
    return dict(get_type_hints(RunConfig))


def assemble(values: Mapping[str, Any]) -> RunConfig:
    """Return the schema's defaults with `section.field` values put in."""
    built = {}
    for section, config in sections().items():
        own = {name.split(".")[1]: v for name, v in values.items() if name.startswith(section + ".")}
        built[section] = config(**own)
    return RunConfig(**built)
