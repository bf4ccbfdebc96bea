"""Write text with a trained model: `tools/generate.py --load CKPT --prompt TEXT`.

Opens a checkpoint of any layout in one process. The architecture and the tokenizer come from the checkpoint.
"""

from __future__ import annotations

import argparse
import sys

import torch

from megatron.checkpoint.layout import CheckpointError
from megatron.config.errors import ConfigError
from megatron.data.errors import DataError
from megatron.generate import Sampling, device_of, generate, room_after
from megatron.restore import open_model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--load", required=True, help="directory of checkpoints, or one iter_ directory")
    parser.add_argument("--load-iteration", type=int, help="which iteration of --load; default the latest")
    parser.add_argument("--prompt", required=True, help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most probable tokens; 0 is all")
    parser.add_argument("--top-p", type=float, default=0.0, help="choose among the fewest tokens of this probability; 0 is all")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--no-cache", action="store_true", help="compute keys and values again for each token")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    try:
        device = device_of(args.device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {args.max_new_tokens} writes nothing; legal: 1 and above")
        opened = open_model(args.load, iteration=args.load_iteration, device=device)
        if opened.tokenizer is None:
            raise DataError(f"{opened.directory} holds no tokenizer: it was not saved by a pretraining run")
        prompt = opened.tokenizer.tokenize(args.prompt)
        tokens = list(
            generate(
                opened.model,
                prompt,
                max_new_tokens=args.max_new_tokens,
                sampling=sampling,
                seed=args.seed,
                stop=opened.tokenizer.special.get("eod"),
                use_cache=not args.no_cache,
            )
        )
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    room = room_after(opened.model, prompt)
    if room is not None and len(tokens) == room < args.max_new_tokens:
        print(
            f"note: --max-new-tokens {args.max_new_tokens} was cut to {room}: the model ends at position "
            f"{len(prompt) + room}, and the prompt takes {len(prompt)}",
            file=sys.stderr,
        )
    print(opened.tokenizer.detokenize([*prompt, *tokens]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
