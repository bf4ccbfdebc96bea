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
from dataclasses import replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    import torch

    from megatron.checkpoint.find import find
    from megatron.checkpoint.layout import CheckpointError
    from megatron.config.errors import ConfigError
    from megatron.data.errors import DataError
    from megatron.files.regular import MAX_PROMPTS_BYTES, parse_json, read_text
    from megatron.inference.beam_search import BeamSearch
    from megatron.inference.generate import GeneratedText, Sampling, check_prompt, extend_texts, free_positions
    from megatron.inference.model_flags import add_model_flags, choose_layout, parse_once, report_refusal
    from megatron.inference.restore import open_pipeline, text_tokenizer
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
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        search = search_of(args)
        prompts = args.prompt or read_prompts(Path(args.prompt_file))
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens} writes nothing; legal: 1 and above")
        if args.micro_batch_size < 1:
            raise ValueError(f"--micro-batch-size {args.micro_batch_size} takes no prompt; legal: 1 and above")
        find(
            Path(args.load),
            args.load_iteration,
            lambda line: print(f"note: {line}", file=sys.stderr) if env.rank == 0 else None,
        )
        with job(env, explain=lambda error, where: str(error) if isinstance(error, REFUSED) else None) as started:
            own = device if env.world_size == 1 else started.device
            answers, notes = answer(args, started, grid, own, prompts, search or sampling)
    except REFUSED as error:
        return report_refusal(error, env)
    if env.rank == 0:
        print(notes, end="", file=sys.stderr)
        if args.prompt_file is None and len(prompts) == 1:
            print(answers[0]["text"])
        else:
            print(*(json.dumps(answer, ensure_ascii=False) for answer in answers), sep="\n")
    return 0


def answer(
    args: argparse.Namespace, started: Job, grid: Grid, device: torch.device, prompts: list[str], how: Sampling | BeamSearch
) -> tuple[list[dict[str, object]], str]:
    """Each prompt with what the model adds, and what there is to say about it. Collective."""
    mesh = Mesh.build(grid, started.env.rank, started.timeout, watch=started.watch)
    opened = open_pipeline(args.load, mesh, iteration=args.load_iteration, device=device)
    tokenizer = text_tokenizer(opened)
    stop = tokenizer.special.get("eod") if args.stop_token is None else args.stop_token
    vocabulary = opened.config.known_vocab_size
    if args.stop_token is not None and not 0 <= args.stop_token < vocabulary:
        raise ValueError(f"--stop-token {args.stop_token} is outside of the vocabulary of {vocabulary}")
    started_with = [tokenizer.tokenize(prompt) for prompt in prompts]
    for number, tokens in enumerate(started_with, 1):  # all of them, before the first one takes its time
        try:
            check_prompt(opened.model, tokens)
        except ValueError as error:
            raise ValueError(f"prompt {number} of {len(prompts)}: {error}") from error
    limits = {"max_new_tokens": args.max_new_tokens, "use_cache": not args.no_cache}
    found: list[tuple[list[int], str, float | None]] = []
    if isinstance(how, BeamSearch):
        for tokens in started_with:
            *_, beams = replace(how, stop=stop).run(opened.model, tokens, **limits)
            found.append(([*tokens, *beams[0].tokens], beams[0].end, beams[0].score))
    else:
        texts = [GeneratedText.after(tokens) for tokens in started_with]

        def stops(text: GeneratedText) -> bool:
            return text.tokens[-1] == stop

        for first in range(0, len(texts), args.micro_batch_size):
            some = texts[first : first + args.micro_batch_size]
            for _ in extend_texts(opened.model, some, sampling=how, seed=args.seed, first=first, stops=stops, **limits):
                pass
        found = [(text.tokens, text.end, None) for text in texts]
    answers, notes = [], ""
    for prompt, before, (tokens, end, score) in zip(prompts, started_with, found, strict=True):
        room = free_positions(opened.model, before)
        if room is not None and len(tokens) - len(before) == room < args.max_new_tokens and end == "length":
            notes += (
                f"note: --max-new-tokens {args.max_new_tokens} was cut to {room}: the model ends at position "
                f"{len(before) + room}, and the prompt takes {len(before)}\n"
            )
        text = tokenizer.detokenize(tokens[:-1] if end == "stop" else tokens)
        answers.append({"prompt": prompt, "text": text, "end": end} | ({} if score is None else {"score": score}))
    return answers, notes


def search_of(args: argparse.Namespace) -> BeamSearch | None:
    """The beam search that is asked for, without its stop token; ValueError for flags that do not go together."""
    if args.beam_width is None:
        if args.length_penalty is not None:
            raise ValueError("--length-penalty belongs to a beam search: give --beam-width")
        return None
    if (args.temperature, args.top_k, args.top_p) != (1.0, 0, 0.0):
        raise ValueError("--beam-width chooses nothing at random: leave --temperature, --top-k and --top-p out")
    return BeamSearch(args.beam_width, 1.0 if args.length_penalty is None else args.length_penalty)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are left out. ValueError for a file without any, and for a line that is none."""
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
