"""Write text with a trained model: `tools/generate.py --load CKPT --prompt TEXT`.

One --prompt gives its text. Several of them, or a --prompt-file, give one line of JSON each, in their order: the prompt, the
text, why it ended, and with --beam-width the score.

Opens a checkpoint of any layout. The architecture and the tokenizer come from the checkpoint. Started by torchrun on several
processes, it cuts the model over them: --tensor-model-parallel-size x --pipeline-model-parallel-size must be their number.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    import torch

    from megatron.checkpoint.find import find_checkpoint
    from megatron.checkpoint.layout import CheckpointError
    from megatron.config.errors import ConfigError
    from megatron.data.errors import DataError
    from megatron.files.regular import MAX_PROMPTS_BYTES, parse_json, read_text
    from megatron.inference.completions import check_limits, choose_decoding, generate
    from megatron.inference.model_flags import add_model_flags, choose_layout, parse_once, report_refusal
    from megatron.inference.restore import open_pipeline
    from megatron.launch.environment import LaunchEnvironment
    from megatron.launch.job import Job, job
    from megatron.launch.tool_parser import ToolParser, non_empty_name
    from megatron.mesh.grid import Grid
    from megatron.mesh.mesh import Mesh

REFUSED = (CheckpointError, ConfigError, DataError, ValueError)  # what was asked for cannot be done; needs no traceback


def main(argv: list[str]) -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_model_flags(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", help="text to go on from; may be given several times")
    given.add_argument(
        "--prompt-file",
        type=non_empty_name,
        help='prompts, one a line: plain text, or in a .jsonl file strings or {"prompt": ...}',
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most probable tokens; 0 is all")
    parser.add_argument("--top-p", type=float, default=0.0, help="choose among the fewest tokens of this probability; 0 is all")
    parser.add_argument("--beam-width", type=int, help="search this many most probable texts at once; the best is written")
    parser.add_argument("--length-penalty", type=float, help="of the beam search: above 1 for long texts (default 1)")
    parser.add_argument("--stop-token", type=int, help="the token that ends a text; default that of the tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="prompts that are continued together (default 32)")
    parser.add_argument("--no-cache", action="store_true", help="compute keys and values again for each token")
    args = parse_once(parser.parse_args, argv)
    env = LaunchEnvironment()
    try:
        env = LaunchEnvironment.from_environ(os.environ)
        grid, device = choose_layout(args, env)
        choose_decoding(args.temperature, args.top_k, args.top_p, args.beam_width, args.length_penalty)
        prompts = args.prompt or read_prompts(Path(args.prompt_file))
        check_limits(args.max_new_tokens, args.micro_batch_size)
        # A mistake in --load is said before the ranks meet.
        find_checkpoint(
            Path(args.load),
            args.load_iteration,
            lambda line: print(f"note: {line}", file=sys.stderr) if env.rank == 0 else None,
        )
        with job(env, explain=lambda error, where: str(error) if isinstance(error, REFUSED) else None) as started:
            own = device if env.world_size == 1 else started.device  # of several processes the job gives each its own
            answers, notes = complete_prompts(args, started, grid, own, prompts)
    except REFUSED as error:
        return report_refusal(error, env)
    if env.rank == 0:
        print(notes, end="", file=sys.stderr)
        if args.prompt_file is None and len(prompts) == 1:
            print(answers[0]["text"])
        else:
            print(*(json.dumps(answer, ensure_ascii=False) for answer in answers), sep="\n")
    return 0


def complete_prompts(
    args: argparse.Namespace, started: Job, grid: Grid, device: torch.device, prompts: list[str]
) -> tuple[list[dict[str, object]], str]:
    """Complete each prompt. Collective.

    Args:
        args: the command line.
        started: this process's job.
        grid: over which the model is cut.
        device: of this process.
        prompts: texts.

    Returns:
        Of each prompt the JSON object of its text, and notes for the user, each with a newline.

    Raises:
        ValueError: for a --stop-token or a prompt that does not fit the model.
    """
    mesh = Mesh.build(grid, started.env.rank, started.timeout, watch=started.watch)
    opened = open_pipeline(args.load, mesh, iteration=args.load_iteration, device=device)
    completions = generate(
        opened,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        beam_width=args.beam_width,
        length_penalty=args.length_penalty,
        stop_token=args.stop_token,
        seed=args.seed,
        micro_batch_size=args.micro_batch_size,
        use_cache=not args.no_cache,
    )
    answers, notes = [], ""
    for done in completions:
        if done.positions_left is not None:
            notes += (
                f"note: --max-new-tokens {args.max_new_tokens} was cut to {done.positions_left}: the model ends at position "
                f"{done.prompt_tokens + done.positions_left}, and the prompt takes {done.prompt_tokens}\n"
            )
        answers.append(
            {"prompt": done.prompt, "text": done.text, "end": done.end} | ({} if done.score is None else {"score": done.score})
        )
    return answers, notes


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line; empty lines are left out. ValueError for a file without any, and for a line that is none."""
    try:
        lines = read_text(path, MAX_PROMPTS_BYTES, pipes=True).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {path}: {getattr(error, 'strerror', None) or error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt: object = line.rstrip("\r")
        if path.suffix == ".jsonl":
            try:
                prompt = parse_json(line)
            except ValueError as error:
                raise ValueError(f"--prompt-file {path}, line {number} is no JSON: {error}") from error
            prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(prompt, str):
            raise ValueError(f'--prompt-file {path}, line {number} is neither a string nor an object with "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--prompt-file {path} holds no prompts")
    return prompts


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
