"""The model's files read like a textbook: few of their lines speak of how the model is cut over ranks."""

from __future__ import annotations

import re
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / "megatron" / "model"
MAX_SHARE = 0.10
WORDS = (
    *("tp", "pp", "cp", "dp", "ranks?", "ax[ei]s", "mesh", r"\w*parallel\w*", "world_size"),
    *("collectives?", r"gather\w*", r"scatter\w*", r"reduc(?:e|tion)(?!=)\w*", "all_gather", "all_reduce", "all_to_all"),
    *("copy_to", r"\w*shard\w*", "split_over", "scatter_to", "sum_grad_over", r"column_?linears?", r"row_?linears?"),
)
PATTERN = re.compile(rf"(?<![a-z])(?:{'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)


def speaks_of_ranks(line: str) -> bool:
    return PATTERN.search(line) is not None


def test_the_words_are_found_where_they_stand() -> None:
    for line in (
        "    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:",
        "from megatron.parallel.linear import ColumnLinear",
        "        x = gather_and_reduce_grad(x, axis)",
        "every rank holds it whole",
        "        if self.sequence_parallel:",
        "        self.up = ColumnLinear(hidden, ffn, bias=bias)",
        "    def __init__(self, vocabulary: VocabShard) -> None:",
        "        loss = all_reduce(loss)  # reduce over pp",
    ):
        assert speaks_of_ranks(line), line
    for line in (
        "        x = self.norm(x)",
        "    output: of the whole layer",
        "        http = attempt(step)",
        "self.groups = groups",
        'loss = F.cross_entropy(logits, labels, reduction="none")',  # over samples
    ):
        assert not speaks_of_ranks(line), line


def test_at_most_a_tenth_of_the_lines_speaks_of_ranks() -> None:
    lines = {path.name: path.read_text().splitlines() for path in sorted(MODEL.glob("*.py"))}
    found = {name: sum(map(speaks_of_ranks, text)) for name, text in lines.items()}
    share = sum(found.values()) / sum(map(len, lines.values()))
    assert share <= MAX_SHARE, f"{share:.1%} of the lines: {found}"
