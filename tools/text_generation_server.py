"""Serve a trained model over HTTP: `tools/text_generation_server.py --load CKPT`.

Answers Megatron-LM's `PUT /api` and OpenAI's `POST /v1/completions` and `/v1/chat/completions`, see
examples/text_generation_server. Started by torchrun on several processes, it cuts the model over them:
--tensor-model-parallel-size x --pipeline-model-parallel-size must be their number. SIGTERM and Ctrl-C end it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

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

REFUSED = (CheckpointError, ConfigError, DataError, ValueError)  # what was asked for cannot be done; needs no traceback


def main(argv: list[str]) -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on; 0 is any free one (default 5000)")
    parser.add_argument("--model-name", help="the model's name for clients; default that of the directory of --load")
    parser.add_argument("--max-tokens-to-oom", type=int, default=12000, help="most tokens of a request (default 12000)")
    parser.add_argument("--chat-template", type=non_empty_path, metavar="FILE", help="Jinja template; default the checkpoint's")
    add_access_flags(parser)
    args = parse_once(parser.parse_args, argv)
    env = LaunchEnvironment()
    try:
        env = LaunchEnvironment.from_environ(os.environ)
        grid, device = choose_layout(args, env)
        if args.max_tokens_to_oom < 1:
            raise ValueError(f"--max-tokens-to-oom {args.max_tokens_to_oom} allows nothing; legal: 1 and above")
        limits = ConnectionLimits(args.request_timeout, args.keep_alive_timeout, args.send_timeout, args.max_connections)
        if not args.health_timeout > 0:
            raise ValueError(f"--health-timeout {args.health_timeout} is no time; legal: above 0")
        template = None if args.chat_template is None else read_template(args.chat_template)
        access = Access.for_server(args.host, args.allow_host, args.allow_origin, check_key(args.api_key, os.environ))
        require_packages()
        # A mistake in --load is said before the ranks meet.
        find_checkpoint(
            Path(args.load),
            args.load_iteration,
            lambda line: print(f"note: {line}", file=sys.stderr) if env.rank == 0 else None,
        )
        explain = lambda error, where: str(error) if isinstance(error, REFUSED) else None  # noqa: E731
        with closing(StopSignals(exit_at_signal)) as signals:
            signals.install()
            with guarded(env, explain=explain, signals=signals) as guard, job(env, guard=guard) as started:
                device = device if env.world_size == 1 else started.device
                run_server(args, started, grid, device, signals, access=access, limits=limits, template=template)
    except REFUSED as error:
        return report_refusal(error, env)
    return 0


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say who may ask, and how long a client may take."""
    usual = ConnectionLimits()
    parser.add_argument(
        "--api-key", help=f"key that clients must send; better in the variable {KEY_VARIABLE}, which `ps` does not show"
    )
    for flag, name, what in (
        ("--allow-origin", "ORIGIN", "origin of web pages that may ask, such as https://app.example.org"),
        ("--allow-host", "NAME", "name of this server besides localhost, addresses and the machine's own"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=name, help=f"{what}; may be repeated; * is all")
    for name, default, what in (
        ("request", usual.request_timeout, "for a request to arrive whole"),
        ("keep-alive", usual.keep_alive_timeout, "for the next request on an open connection"),
        ("send", usual.send_timeout, "for which a client may leave its reply unread"),
        ("health", 60.0, "without a token, after which /health says that the model is stuck"),
    ):
        parser.add_argument(f"--{name}-timeout", type=float, default=default, help=f"seconds {what} (default {default:g})")
    parser.add_argument(
        "--max-connections", type=int, default=usual.max_connections, help=f"at once (default {usual.max_connections})"
    )


def exit_at_signal(name: str) -> None:
    """End at a signal that comes before there is anything to end."""
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
        args: the command line.
        started: this process's job.
        grid: over which the model is cut.
        device: of this process.
        signals: that end it.
        access: who may ask.
        limits: of connections.
        template: of chats, None for the checkpoint's.
    """
    mesh = Mesh.build(grid, started.env.rank, started.timeout, watch=started.watch)
    # Before the weights are read, which takes long; after the ranks have met, so that all hear of a port that is taken.
    opened_port = open_port(args.host, args.port) if started.is_main else None
    opened = open_pipeline(args.load, mesh, iteration=args.load_iteration, device=device)
    engine = Engine(opened.model, text_tokenizer(opened), Control(mesh.world, started.timeout), started.watch)
    service = None
    if started.is_main:
        files = ChatFiles.from_directory(opened.directory / TOKENIZER, engine.tokenizer, template)
        chat = ChatTemplate(files, engine.tokenizer, max_body_bytes(args.max_tokens_to_oom))
        if chat.unusable and files.template is not None:
            log_line(f"note: no chats: {chat.unusable}")
        if access.key is None and args.host not in LOOPBACK:
            log_line(f"note: whoever reaches {args.host} can use the model; {KEY_VARIABLE} or --api-key asks for a key")
        name = args.model_name or Path(args.load).resolve().name
        service = Service(engine, name, args.max_tokens_to_oom, log_line, chat, access, args.health_timeout)
    serve(engine, opened_port, service, signals, limits)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
