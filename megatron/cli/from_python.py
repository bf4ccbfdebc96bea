"""Train from Python as the programs do from a command line: the same settings, files and messages, but mistakes are raised.

Imports torch only when a run begins.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from megatron.cli.program import PRETRAINING_DEFAULTS, saved_config
from megatron.config.command_line.parse import Parsed, parse
from megatron.config.errors import ConfigError
from megatron.config.outputs import check_outputs
from megatron.config.resolve import resolve
from megatron.config.rules import check_files, examine
from megatron.config.schema import RunConfig, RunSettings
from megatron.launch.environment import LaunchEnvironment
from megatron.launch.signals import StopSignals
from megatron.train.progress import EarlyStop, Progress

if TYPE_CHECKING:
    from megatron.train.ending import Exit


def parse_args(args: Sequence[str], *, architecture: Literal["gpt", "bert"] = "gpt") -> RunConfig:
    """Return the run that a command line of `pretrain_gpt.py` or `pretrain_bert.py` means.

    A file of settings is given as there: `["--config", "run.toml"]`. What is read differently from how it was typed, or has no
    effect, is a Python warning.

    Args:
        args: flags and their values.
        architecture: the program whose defaults count.

    Raises:
        ConfigError: with all mistakes at once, in the words of the programs.
        HelpRequested: for `--help` and `--version`, with the answer.
    """
    env = LaunchEnvironment.from_environ(os.environ)
    program, defaults = f"pretrain_{architecture}.py", PRETRAINING_DEFAULTS[architecture]
    parsed = parse(args, program=program, defaults=defaults, world_size=env.world_size, read_saved=saved_config)
    if env.rank == 0:
        for note in parsed.notes:
            warnings.warn(note, stacklevel=2)
    return parsed.config


def configure(settings: RunSettings) -> RunConfig:
    """Return the run that settings ask for, on as many ranks as the launcher started.

    Every setting that follows from others is filled in, and all rules are checked, also those that look at the disk.

    Raises:
        ConfigError: with all mistakes at once.
    """
    env = LaunchEnvironment.from_environ(os.environ)
    checked, problems = examine(settings, env.world_size)
    problems += [*check_files(checked), *check_outputs(checked, [])]
    if problems:
        raise ConfigError(problems)
    return resolve(checked.resolved, env.world_size)


def pretrain(config: RunConfig) -> Exit:
    """Pretrain a model, on this process alone or on all that `torchrun` or `srun` has started. Collective.

    Console, metrics and checkpoints are those of the programs. SIGTERM and SIGUSR1 end the run with a checkpoint; Ctrl-C
    raises KeyboardInterrupt.

    Args:
        config: of `parse_args` or `configure`.

    Returns:
        `Exit.FINISHED`, or `Exit.STOPPED` for a run that was stopped on request and goes on from its checkpoint.

    Raises:
        InputError: tokenizer, data or checkpoint cannot be used.
        TrainingError: training failed.
        JobError: the devices cannot be used, or the ranks do not find one another. An error of one of several ranks is
            reported by it, and ends all of them.
    """
    from megatron.train.ending import Exit
    from megatron.train.pretraining import start

    began = time.monotonic()
    env = LaunchEnvironment.from_environ(os.environ)
    early = EarlyStop(env.rank)
    early.progress = Progress(None if config.eval.skip_train else config.checkpoint.save)
    if not config.checkpoint.auto_resume:
        early.resume_advice = "start again with --auto-resume to go on"
    signals = StopSignals(early.exit_process)
    signals.install()
    try:
        return Exit(start(Parsed(config, False, env.world_size, frozenset(), ()), env, began, signals, early))
    finally:
        signals.close()
