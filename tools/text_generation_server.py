"""Serve a trained model over HTTP: `tools/text_generation_server.py --load CKPT`.

Answers Megatron-LM's `PUT /api` and OpenAI's `POST /v1/completions` and `/v1/chat/completions`, see
examples/text_generation_server. With torchrun, the model is sharded over the processes; --tensor-model-parallel-size x
--pipeline-model-parallel-size must be their number. SIGTERM and Ctrl-C end the server.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    import torch

    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.layout import TOKENIZER, CheckpointError
    from megatron.config.errors import ConfigError
    from megatron.data.errors import DataError
    from megatron.inference.model_flags import add_model_flags, choose_layout, parse_once, report_refusal
    from megatron.inference.restore import open_pipeline, text_tokenizer
    from megatron.launch.environment import LaunchEnvironment
    from megatron.launch.job import Job, guarded, job
    from megatron.launch.signals import StopSignals
    from megatron.launch.tool_parser import ToolParser, non_empty_path
    from megatron.mesh.grid import Grid
    from megatron.mesh.mesh import Mesh
    from megatron.serving.access import KEY_VARIABLE, LOOPBACK, Access, check_key
    from megatron.serving.app import Service, max_body_bytes
    from megatron.serving.chat_template import ChatFiles, ChatTemplate, read_template
    from megatron.serving.connections import ConnectionLimits
    from megatron.serving.control import Control
    from megatron.serving.engine import Engine
    from megatron.serving.server import log_line, open_port, require_packages, serve

CACHED_REQUESTS = 2  # number of the largest requests for which the key-value caches have room at once
INPUT_ERRORS = (CheckpointError, ConfigError, DataError, ValueError)  # bad input: reported in one line, without a traceback


def main(argv: list[str]) -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on; 0 is any free one (default 5000)")
    parser.add_argument("--model-name", help="the model's name for clients; default the directory name of --load")
    parser.add_argument("--max-tokens-to-oom", type=int, default=12000, help="maximum tokens of a request (default 12000)")
    parser.add_argument("--chat-template", type=non_empty_path, metavar="FILE", help="Jinja template; default the checkpoint's")
    add_access_flags(parser)
    args = parse_once(parser.parse_args, argv)
    env = LaunchEnvironment()
    try:
        env = LaunchEnvironment.from_environ(os.environ)
        grid, device = choose_layout(args, env)
        if args.max_tokens_to_oom < 1:
            raise ValueError(f"--max-tokens-to-oom {args.max_tokens_to_oom} is too small; legal: 1 and above")
        limits = ConnectionLimits(args.request_timeout, args.keep_alive_timeout, args.send_timeout, args.max_connections)
        if not args.health_timeout > 0:
            raise ValueError(f"--health-timeout {args.health_timeout} is invalid; legal: above 0")
        template = None if args.chat_template is None else read_template(args.chat_template)
        access = Access.for_server(args.host, args.allow_host, args.allow_origin, check_key(args.api_key, os.environ))
        require_packages()
        # Report a mistake in --load before the ranks connect to each other.
        find_checkpoint(
            Path(args.load),
            args.load_iteration,
            lambda line: print(f"note: {line}", file=sys.stderr) if env.rank == 0 else None,
        )
        explain = lambda error, where: str(error) if isinstance(error, INPUT_ERRORS) else None  # noqa: E731
        with closing(StopSignals(exit_at_signal)) as signals:
            signals.install()
            with guarded(env, explain=explain, signals=signals) as guard, job(env, guard=guard) as started:
                device = device if env.world_size == 1 else started.device
                run_server(args, started, grid, device, signals, access=access, limits=limits, template=template)
    except INPUT_ERRORS as error:
        return report_refusal(error, env)
    return 0


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for access control and timeouts."""
    defaults = ConnectionLimits()
    parser.add_argument(
        "--api-key", help=f"key that clients must send; better in the variable {KEY_VARIABLE}, which `ps` does not show"
    )
    for flag, name, what in (
        ("--allow-origin", "ORIGIN", "origin of web pages that may send requests, such as https://app.example.org"),
        ("--allow-host", "NAME", "name of this server besides localhost, addresses and the machine's own"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=name, help=f"{what}; may be repeated; * allows all")
    for name, default, what in (
        ("request", defaults.request_timeout, "until a request must be complete"),
        ("keep-alive", defaults.keep_alive_timeout, "until the next request on an open connection"),
        ("send", defaults.send_timeout, "for which a client may read its reply too slowly"),
        ("health", 60.0, "without a new token until /health reports that the model is stuck"),
    ):
        parser.add_argument(f"--{name}-timeout", type=float, default=default, help=f"seconds {what} (default {default:g})")
    parser.add_argument(
        "--max-connections",
        type=int,
        default=defaults.max_connections,
        help=f"default {defaults.max_connections}",
    )


def exit_at_signal(name: str) -> None:
    """Exit at once at a signal that arrives before the server runs."""
    os._exit(128 + signal.Signals[name])


def run_server(
    args: argparse.Namespace,
    started: Job,
    grid: Grid,
    device: torch.device,
    signals: StopSignals,
    *,
    access: Access,
    limits: ConnectionLimits,
    template: str | None,
) -> None:
    """Open the model and serve it until a signal comes. Collective.

    Args:
        args: the parsed command line.
        started: this process's running job.
        grid: the ranks over which the model is sharded.
        device: this process's device.
        signals: the signals that end the server.
        access: the requirements for requests.
        limits: the limits of connections.
        template: the chat template; None for the checkpoint's.
    """
    mesh = Mesh.build(grid, started.env.rank, started.timeout, watch=started.watch)
    # Bind the port before the weights are read, which takes long, but after the ranks connect, so that an error ends all ranks.
    bound_socket = open_port(args.host, args.port) if started.is_main else None
    opened = open_pipeline(args.load, mesh, iteration=args.load_iteration, device=device)
    opened.model.pack_weights()
    control = Control(mesh.world, started.timeout)
    engine = Engine(opened.model, text_tokenizer(opened), control, started.watch, CACHED_REQUESTS * args.max_tokens_to_oom)
    service = None
    if started.is_main:
        files = ChatFiles.from_directory(opened.directory / TOKENIZER, engine.tokenizer, template)
        chat = ChatTemplate(files, engine.tokenizer, max_body_bytes(args.max_tokens_to_oom))
        if chat.unusable and files.template is not None:
            log_line(f"note: chats are not available: {chat.unusable}")
        if access.key is None and args.host not in LOOPBACK:
            log_line(f"note: anyone who reaches {args.host} can use the model; {KEY_VARIABLE} or --api-key requires a key")
        name = args.model_name or Path(args.load).resolve().name
        service = Service(engine, name, args.max_tokens_to_oom, log_line, chat, access, args.health_timeout)
    serve(engine, bound_socket, service, signals, limits)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
