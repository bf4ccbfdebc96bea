"""Distributed training of large transformer language models with tensor and pipeline parallelism.

The names below are what scripts import; each is loaded when it is first used, so that `import megatron` takes no time.

Train, load and generate:

    import megatron

    config = megatron.parse_args(["--config", "run.toml", "--train-iters", "100", "--save", "runs/gpt"])
    megatron.pretrain(config)
    model = megatron.load("runs/gpt")
    print(megatron.generate(model, "def ", max_new_tokens=40)[0].text)

Export to Hugging Face:

    megatron.export_hf("runs/gpt", "runs/gpt-hf")

Read an indexed dataset:

    dataset = megatron.IndexedDataset("runs/corpus_text_document")
    print(len(dataset), dataset[0])  # number of sequences, and the token ids of the first one

A mistake raises an exception with the words of the command line. Under `torchrun`, `parse_args`, `configure` and `pretrain` are
called on all ranks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.checkpoint.layout import CheckpointError
    from megatron.cli.from_python import configure, parse_args, pretrain
    from megatron.config.errors import ConfigError
    from megatron.config.schema import ModelConfig, RunConfig, RunSettings, TokenizerConfig
    from megatron.contract import Batch
    from megatron.data.bert import BertDataset
    from megatron.data.errors import DataError
    from megatron.data.gpt import GPTDataset
    from megatron.data.indexed import IndexedDataset, IndexedWriter
    from megatron.data.tokenizer import build_tokenizer
    from megatron.inference.completions import PromptCompletion, generate
    from megatron.inference.restore import OpenedModel
    from megatron.inference.restore import open_model as load
    from megatron.interop.checked_export import ExportError, export_hf
    from megatron.launch.environment import LaunchEnvironment
    from megatron.launch.errors import InputError, JobError
    from megatron.launch.job import Job, job
    from megatron.model.bert import Bert
    from megatron.model.gpt import GPT
    from megatron.train.ending import Exit
    from megatron.train.errors import TrainingError
    from megatron.train.run import Run, build_run

__version__ = "0.1.0"

# Where each public name is defined. The imports above tell type checkers the same; tests/test_public_face.py compares them.
_HOMES = {
    "CheckpointError": "megatron.checkpoint.layout:CheckpointError",
    "configure": "megatron.cli.from_python:configure",
    "parse_args": "megatron.cli.from_python:parse_args",
    "pretrain": "megatron.cli.from_python:pretrain",
    "ConfigError": "megatron.config.errors:ConfigError",
    "ModelConfig": "megatron.config.schema:ModelConfig",
    "RunConfig": "megatron.config.schema:RunConfig",
    "RunSettings": "megatron.config.schema:RunSettings",
    "TokenizerConfig": "megatron.config.schema:TokenizerConfig",
    "Batch": "megatron.contract:Batch",
    "BertDataset": "megatron.data.bert:BertDataset",
    "DataError": "megatron.data.errors:DataError",
    "GPTDataset": "megatron.data.gpt:GPTDataset",
    "IndexedDataset": "megatron.data.indexed:IndexedDataset",
    "IndexedWriter": "megatron.data.indexed:IndexedWriter",
    "build_tokenizer": "megatron.data.tokenizer:build_tokenizer",
    "PromptCompletion": "megatron.inference.completions:PromptCompletion",
    "generate": "megatron.inference.completions:generate",
    "OpenedModel": "megatron.inference.restore:OpenedModel",
    "load": "megatron.inference.restore:open_model",
    "ExportError": "megatron.interop.checked_export:ExportError",
    "export_hf": "megatron.interop.checked_export:export_hf",
    "LaunchEnvironment": "megatron.launch.environment:LaunchEnvironment",
    "InputError": "megatron.launch.errors:InputError",
    "JobError": "megatron.launch.errors:JobError",
    "Job": "megatron.launch.job:Job",
    "job": "megatron.launch.job:job",
    "Bert": "megatron.model.bert:Bert",
    "GPT": "megatron.model.gpt:GPT",
    "Exit": "megatron.train.ending:Exit",
    "TrainingError": "megatron.train.errors:TrainingError",
    "Run": "megatron.train.run:Run",
    "build_run": "megatron.train.run:build_run",
}

__all__ = [
    "GPT",
    "Batch",
    "Bert",
    "BertDataset",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Exit",
    "ExportError",
    "GPTDataset",
    "IndexedDataset",
    "IndexedWriter",
    "InputError",
    "Job",
    "JobError",
    "LaunchEnvironment",
    "ModelConfig",
    "OpenedModel",
    "PromptCompletion",
    "Run",
    "RunConfig",
    "RunSettings",
    "TokenizerConfig",
    "TrainingError",
    "build_run",
    "build_tokenizer",
    "configure",
    "export_hf",
    "generate",
    "job",
    "load",
    "parse_args",
    "pretrain",
]

if not TYPE_CHECKING:  # a type checker would take any name for one that is here

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(import_module(module), attribute)

    def __dir__() -> "list[str]":  # in quotes, so that an older Python comes as far as the message that it is too old
        """List the public names too, which are not here until they are used."""
        return sorted({*globals(), *__all__})
