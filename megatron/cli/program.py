"""Entry points of the programs: run a command line, and return its exit status.

A command is parsed and checked before torch is imported, so its mistakes are reported within a second.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from megatron.cli.dry_run import dry_run
from megatron.config.command_line.parse import HelpRequested, Parsed, parse, report_and_exit
from megatron.config.errors import ConfigError, Problem
from megatron.config.schema import CheckpointConfig
from megatron.files.side import forgiving_streams, piped_streams
from megatron.launch.command_line import torchrun_command, typed_command
from megatron.launch.environment import LaunchEnvironment, LaunchEnvironmentError
from megatron.launch.exit_report import let_rank_0_report, write_error_file, write_stderr
from megatron.launch.signals import StopSignals
from megatron.train.interrupt import RunInterruptHandler, resume_advice
from megatron.train.progress import STOPPED, EarlyStop, Progress

# Defaults of each pretraining program: architecture -> `section.field` -> value.
PRETRAINING_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "gpt": {"tokenizer.tokenizer_type": "GPT2BPETokenizer"},
    "bert": {"model.architecture": "bert", "tokenizer.tokenizer_type": "BertWordPieceLowerCase"},
}
JOIN_MINUTES = 1 / 3  # a rank that reports a mistake on its host's disk waits this long for rank 0 to join


def pretrain(argv: Sequence[str], *, program: str, defaults: Mapping[str, Any]) -> int:
    """Run a pretraining command.

    Args:
        argv: the command line, without the program's name.
        program: name of the program, for messages.
        defaults: defaults of the program, by `section.field`.

    Returns:
        The exit status: 0 if the run finished, 1 if it failed, 2 for a wrong configuration or wrong data, 75 if it was stopped
        on request.

    Raises:
        SystemExit: with status 2, for a wrong configuration.
    """
    with forgiving_streams():
        return _run_command(argv, program, defaults, task=False)


def run_task(argv: Sequence[str], *, program: str, defaults: Mapping[str, Any]) -> int:
    """Run a command of tasks/main.py.

    Args:
        argv: the command line, without the program's name.
        program: name of the program, for messages.
        defaults: defaults of the program, by `section.field`.

    Returns:
        The exit status, with the same meaning as that of `pretrain`.

    Raises:
        SystemExit: with status 2, for a wrong configuration.
    """
    with forgiving_streams():
        return _run_command(argv, program, defaults, task=True)


def _run_command(argv: Sequence[str], program: str, defaults: Mapping[str, Any], *, task: bool) -> int:
    """Parse a command; then run it, print its dry run, or print the help. Returns the exit status."""
    start_time = time.monotonic()
    try:
        env = LaunchEnvironment.from_environ(os.environ)
    except LaunchEnvironmentError as error:
        problem = Problem("the launcher's environment", f"is wrong: {error}")
        report_and_exit(ConfigError([problem]), program, 0 if error.own else None)
    early_stop = EarlyStop(env.rank)
    early_stop.reading = env.rank > 0 and env.job is not None
    ctrl_c = RunInterruptHandler(env)
    signals = StopSignals(early_stop.exit_process, ctrl_c)
    signals.install()  # before anything slow, so that signals during start-up also stop the run
    try:
        try:
            parsed = read_command(argv, env, program, defaults, task)
        except HelpRequested as help_text:
            with piped_streams():
                if env.rank == 0:
                    sys.stdout.write(str(help_text))
            return 0
        except ConfigError as error:
            signals.close()
            return report_config_error(error, env, program, argv)
        early_stop.reading = False
        if parsed.dry_run:
            with piped_streams():
                return print_dry_run(parsed, program, task) if env.rank == 0 else 0
        ctrl_c.checkpoint, ctrl_c.command = parsed.config.checkpoint, typed_command(program, argv, env)
        early_stop.resume_advice = resume_advice(ctrl_c.command, ctrl_c.checkpoint)
        resumed = resume_after_restart(parsed, env)
        if resumed is None:
            if env.rank == 0:
                sys.stdout.write("this job was stopped on request before torchrun restarted it: nothing is done\n")
            return STOPPED
        parsed = resumed
        early_stop.progress = Progress(None if parsed.config.eval.skip_train else parsed.config.checkpoint.save)
        if task:  # these imports load torch, so they follow the checks of the command
            from megatron.tasks.program import start_task as start
        else:
            from megatron.train.pretraining import start
        from megatron.train.job_runner import report_errors

        return report_errors(partial(start, parsed, env, start_time, signals, early_stop), env)
    finally:
        signals.close(ignore=env.world_size > 1)


def print_dry_run(parsed: Parsed, program: str, task: bool) -> int:
    """Print the dry run of a command, and return the exit status.

    Args:
        parsed: the command.
        program: name of the program, for messages.
        task: the program is tasks/main.py.
    """
    if not task:
        return dry_run(parsed, program)
    from megatron.tasks.program import preview

    return dry_run(parsed, program, preview)


def read_command(argv: Sequence[str], env: LaunchEnvironment, program: str, defaults: Mapping[str, Any], task: bool) -> Parsed:
    """Parse and check the command.

    Args:
        argv: the command line, without the program's name.
        env: this process's launch environment.
        program: name of the program, for messages.
        defaults: defaults of the program, by `section.field`.
        task: the program is tasks/main.py.

    Raises:
        ConfigError: the command has mistakes.
        HelpRequested: the command asks for help or the version.
        SystemExit: with status 1, after an unexpected error.
    """
    try:
        parsed = parse(argv, program=program, defaults=defaults, world_size=env.world_size, read_saved=saved_config, task=task)
    except (ConfigError, HelpRequested):
        raise
    except Exception as error:
        context = f"rank {env.rank} on host {os.uname().nodename}, reading the command"
        line = f"error: {context}: {type(error).__name__}: {error}\n"
        write_error_file(line)
        write_stderr(traceback.format_exc() + line)
        sys.exit(1)
    return parsed


def report_config_error(error: ConfigError, env: LaunchEnvironment, program: str, argv: Sequence[str]) -> int:
    """Report mistakes in the command, once for all ranks, and return the exit status.

    All ranks find the same mistakes in the command, so rank 0 alone reports them. But a mistake on a host's disk may exist on
    that host alone: a rank that finds only such mistakes joins the job and reports them there, which ends all ranks. If rank 0
    does not join, it has found mistakes too and has ended; the first rank of each host then reports its own.

    Args:
        error: the mistakes.
        env: this process's launch environment.
        program: name of the program, for messages.
        argv: the command line, which is repeated in the advice to start more processes.
    """
    if env.rank and error.on_disk:
        from megatron.train.job_runner import refuse_on_all

        if refuse_on_all(error, env, JOIN_MINUTES) or env.local_rank:
            return 2
    elif env.rank:
        let_rank_0_report(env)
    else:
        first, *more = error.problems
        write_error_file(f"error: {first}" + (f" (and {len(more)} more, listed above)" if more else ""))
    ranks = next((problem.ranks for problem in error.problems if problem.ranks), 0)
    advice = []
    if ranks and env.launcher == "python" and "--dry-run" not in argv:
        advice = [f"start {ranks} processes: {shlex.join(torchrun_command(ranks, program, argv))}"]
    report_and_exit(error, program, 0 if error.on_disk else env.rank, advice)


def resume_after_restart(parsed: Parsed, env: LaunchEnvironment) -> Parsed | None:
    """Return the command for a restart by torchrun: it resumes from the checkpoints that earlier attempts of this job saved.

    Returns:
        The command, unchanged if this is the first attempt or none has saved a checkpoint; None if the previous attempt was
        stopped on request.
    """
    checkpoint = parsed.config.checkpoint
    if not env.attempt or checkpoint.save is None:
        return parsed
    progress = Progress(checkpoint.save)
    # The file in --save may have been written by an earlier job, which this command does not resume.
    by_this_job = progress.job == env.job
    if by_this_job and progress.stopped:
        return None
    if checkpoint.auto_resume:
        return parsed
    line = f"restart {env.attempt} by torchrun: "
    from megatron.train.continuation import iteration_in_tracker

    if by_this_job and iteration_in_tracker(checkpoint.save) != progress.tracker:
        line += "resuming from the newest checkpoint of --save, as with --auto-resume"
        checkpoint = replace(checkpoint, auto_resume=True, overwrite=False)
        parsed = replace(parsed, config=replace(parsed.config, checkpoint=checkpoint))
    else:
        line += "this job has not saved a checkpoint yet, so the command starts as before"
    return replace(parsed, notes=(*parsed.notes, line))


def saved_config(checkpoint: CheckpointConfig) -> Mapping[str, Any]:
    """Return the configuration saved in the checkpoint to load, with the tokenizer whose files it contains, if any.

    Raises:
        ConfigError: there is no checkpoint, or its configuration cannot be read.
    """
    from megatron.checkpoint.layout import TOKENIZER, CheckpointError, read_config
    from megatron.data.errors import DataError
    from megatron.data.tokenizer import saved_settings
    from megatron.data.tokenizer_base import SAVED
    from megatron.train.resume import find_source

    try:
        directory = find_source(checkpoint).directory
        if directory is None:
            raise CheckpointError("there is no checkpoint to start from")
        folder = directory / TOKENIZER
        tokenizer = asdict(saved_settings(folder)) if os.path.lexists(folder / SAVED) else {}
        return {**read_config(directory), "tokenizer": tokenizer}
    except (CheckpointError, DataError) as error:
        raise ConfigError([Problem("`--use-checkpoint-args`", f"finds no configuration: {error}")]) from error
