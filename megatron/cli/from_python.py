"""Train from Python as the programs do from a command line: with the same settings, files and messages, but with exceptions.

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
    """Parse a command line of `pretrain_gpt.py` or `pretrain_bert.py` and return the run's configuration.

    A TOML file is given as on the command line: `["--config", "run.toml"]`. Flags that are interpreted differently from how
    they were typed, or have no effect, cause Python warnings.

    Args:
        args: flags and their values.
        architecture: selects the program whose defaults apply.

    Raises:
        ConfigError: the arguments have mistakes; the error lists all of them, with the programs' messages.
        HelpRequested: the arguments contain `--help` or `--version`; the text of the error is the answer.
    """
    env = LaunchEnvironment.from_environ(os.environ)
    program, defaults = f"pretrain_{architecture}.py", PRETRAINING_DEFAULTS[architecture]
    parsed = parse(args, program=program, defaults=defaults, world_size=env.world_size, read_saved=saved_config)
    if env.rank == 0:
        for note in parsed.notes:
            warnings.warn(note, stacklevel=2)
    return parsed.config


def configure(settings: RunSettings) -> RunConfig:
    """Resolve settings into the configuration of a run, on as many ranks as the launcher started.

    Every setting that follows from others is filled in, and all rules are checked, including those that look at the disk.

    Raises:
        ConfigError: the settings have mistakes; the error lists all of them.
    """
    env = LaunchEnvironment.from_environ(os.environ)
    checked, problems = examine(settings, env.world_size)
    problems += [*check_files(checked), *check_outputs(checked, [])]
    if problems:
        raise ConfigError(problems)
    return resolve(checked.resolved, env.world_size)


def pretrain(config: RunConfig) -> Exit:
    """Pretrain a model, in this process alone or in all processes that `torchrun` or `srun` has started. Collective.

    Console output, metrics and checkpoints are the same as those of the programs. SIGTERM and SIGUSR1 end the run with a
    checkpoint; Ctrl-C raises KeyboardInterrupt. If a rank of several fails, it reports the error, and all ranks end.

    Args:
        config: the configuration that `parse_args` or `configure` returned.

    Returns:
        `Exit.FINISHED`, or `Exit.STOPPED` for a run that was stopped on request and can resume from its checkpoint.

    Raises:
        InputError: tokenizer, data or checkpoint cannot be used.
        TrainingError: training failed.
        JobError: the devices cannot be used, or the ranks cannot connect to one another.
    """
    from megatron.train.ending import Exit
    from megatron.train.pretraining import start

    start_time = time.monotonic()
    env = LaunchEnvironment.from_environ(os.environ)
    early_stop = EarlyStop(env.rank)
    early_stop.progress = Progress(None if config.eval.skip_train else config.checkpoint.save)
    if not config.checkpoint.auto_resume:
        early_stop.resume_advice = "start again with --auto-resume to go on"
    signals = StopSignals(early_stop.exit_process)
    signals.install()
    try:
        return Exit(start(Parsed(config, False, env.world_size, frozenset(), ()), env, start_time, signals, early_stop))
    finally:
        signals.close()
