"""Write text with a trained model: `tools/generate.py --load CKPT --prompt TEXT`.

For a single --prompt, the text is printed. For several, or a --prompt-file, one JSON object per prompt is printed, in the same
order: the prompt, the text, why it ended, and with --beam-width the score.

Opens a checkpoint of any layout, which also determines the architecture and the tokenizer. With torchrun, the model is sharded
over the processes; --tensor-model-parallel-size x --pipeline-model-parallel-size must be their number.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

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

INPUT_ERRORS = (CheckpointError, ConfigError, DataError, ValueError)  # bad input: reported in one line, without a traceback


def main(argv: list[str]) -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_model_flags(parser)
    prompt_flags = parser.add_mutually_exclusive_group(required=True)
    prompt_flags.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    prompt_flags.add_argument(
        "--prompt-file",
        type=non_empty_name,
        help='prompts, one per line: plain text, or in a .jsonl file strings or {"prompt": ...}',
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most probable tokens; 0 is all")
    parser.add_argument(
        "--top-p", type=float, default=0.0, help="choose among the most probable tokens up to this sum; 0 is all"
    )
    parser.add_argument("--beam-width", type=int, help="beam search with this many texts at once; the best is written")
    parser.add_argument("--length-penalty", type=float, help="of the beam search: above 1 favors long texts (default 1)")
    parser.add_argument("--stop-token", type=int, help="id of the token that ends a text; default the tokenizer's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices (default 0)")
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
        # Report a mistake in --load before the ranks connect to each other.
        find_checkpoint(
            Path(args.load),
            args.load_iteration,
            lambda line: print(f"note: {line}", file=sys.stderr) if env.rank == 0 else None,
        )
        with job(env, explain=lambda error, where: str(error) if isinstance(error, INPUT_ERRORS) else None) as started:
            device = device if env.world_size == 1 else started.device  # with several processes, the job assigns each a device
            answers, notes = complete_prompts(args, started, grid, device, prompts)
    except INPUT_ERRORS as error:
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
        args: the parsed command line.
        started: this process's running job.
        grid: the ranks over which the model is sharded.
        device: this process's device.
        prompts: the prompts' texts.

    Returns:
        The JSON object of each prompt, in order, and notes for the user, each ending in a newline.

    Raises:
        ValueError: --stop-token or a prompt does not fit the model.
    """
    mesh = Mesh.build(grid, started.env.rank, started.timeout, watch=started.watch)
    opened = open_pipeline(args.load, mesh, iteration=args.load_iteration, device=device)
    opened.model.pack_weights()
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
    """Read one prompt per line, skipping empty lines; ValueError if there is none, or for an invalid line."""
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
                raise ValueError(f"--prompt-file {path}, line {number} is not JSON: {error}") from error
            prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(prompt, str):
            raise ValueError(f'--prompt-file {path}, line {number} is neither a string nor an object with "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--prompt-file {path} has no prompts")
    return prompts


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
