"""A small legal run as a command line, and what is wrong with it after a change."""

from __future__ import annotations

from megatron.config.command_line.parse import parse
from megatron.config.errors import ConfigError

LEGAL: dict[str, str] = {
    "num-layers": "2", "hidden-size": "16", "num-attention-heads": "4", "seq-length": "8", "max-position-embeddings": "8",
    "micro-batch-size": "2", "train-iters": "10", "lr": "1e-3", "tokenizer-type": "ByteTokenizer", "data-path": "data",
}  # fmt: skip


def argv(text: str) -> list[str]:
    """Return the legal run with flags changed: `--flag value` replaces or adds, `--no:flag` takes away."""
    wanted = dict(LEGAL)
    for part in text.split(" --") if text else []:
        name, _, value = part.removeprefix("--").strip().partition(" ")
        if name.startswith("no:"):
            wanted.pop(name[3:], None)
        else:
            wanted[name] = value
    return [word for name, value in wanted.items() for word in (f"--{name}", *value.split())]


def problems(text: str, world: int = 1, check_disk: bool = False) -> list[str]:
    """Parse the legal run with flags changed, and return what is wrong with it.

    Args:
        text: flags as `argv` takes them.
        world: number of ranks.
        check_disk: check also the files and directories that the flags name.
    """
    try:
        parse(argv(text), program="test", world_size=world, check_disk=check_disk)
    except ConfigError as error:
        return [str(p) for p in error.problems]
    return []
