"""The benchmarked models, layouts and contenders. `CASES` are train.py's, `PIPELINES` are pipeline.py's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """A GPT-2-shaped model and its micro-batch. Widths in features, seq in tokens."""

    layers: int
    width: int
    heads: int
    seq: int
    vocab: int
    micro_batch: int

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the forward and backward matmuls of one token, without recomputation.

        With attention over the whole sequence and the output layer: 72 L h^2 (1 + s / 6h + V / 12hL), as in arXiv 2104.04473,
        section 5.1.
        """
        h, depth = self.width, self.layers
        return 72 * depth * h * h * (1 + self.seq / (6 * h) + self.vocab / (12 * h * depth))

    @property
    def causal_flops_per_token(self) -> float:
        """The same with the causal half of attention, as NVIDIA's tables count."""
        return self.flops_per_token - 6 * self.layers * self.seq * self.width


@dataclass(frozen=True)
class Case:
    """One comparison: every contender trains the same dimensions, in processes of its own, in turns."""

    title: str
    dims: Dims
    contenders: tuple[str, ...]
    device: str = "cpu"
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    micro_batches: int = 1  # of each data-parallel rank in a step
    sequence_parallel: bool = False
    threads: int = 1  # of each rank, on a CPU
    steps: int = 5  # in one round

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.dp * self.cp * self.tp * self.pp

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step takes on all ranks together."""
        return self.dp * self.micro_batches * self.dims.micro_batch * self.dims.seq


SMALL = Dims(layers=4, width=256, heads=8, seq=256, vocab=8192, micro_batch=4)
ONE = ("ours", "transformers-stock", "transformers", "plain-torch")
GPU = ("ours", "transformers")

CASES = {
    "small": Case("4 layers, width 256, fp32, 2 threads", SMALL, ONE, threads=2),
    "gpt2": Case("GPT-2 small, sequence 512, fp32, 2 threads", Dims(12, 768, 12, 512, 50257, 2), ONE, threads=2, steps=1),
    "dp2": Case("2 data-parallel ranks", SMALL, ("ours", "ours-gloo", "transformers-ddp", "ours-ddp"), dp=2),
    "tp2": Case("2 tensor-parallel ranks", SMALL, ("ours", "ours-gloo", "dtensor"), tp=2),
    "tp2-sp": Case(
        "2 tensor- and sequence-parallel ranks", SMALL, ("ours", "ours-gloo", "dtensor"), tp=2, sequence_parallel=True
    ),
    "gpu-gpt2": Case("GPT-2 small, bf16", Dims(12, 768, 12, 1024, 50257, 32), GPU, device="cuda", steps=20),
    "gpu-345m": Case("GPT-2 345M, bf16", Dims(24, 1024, 16, 1024, 50257, 16), GPU, device="cuda", steps=10),
    "gpu-1.2b": Case("GPT 1.2B, bf16", Dims(40, 1536, 16, 1024, 50257, 8), GPU, device="cuda", steps=5),
    "gpu-345m-fusion": Case(
        "GPT-2 345M, bf16, not compiled, 4 micro-batches: gradient accumulation fusion on and off",
        Dims(24, 1024, 16, 1024, 50257, 8),
        ("ours-eager", "ours-eager-unfused"),
        device="cuda",
        micro_batches=4,
        steps=5,
    ),
    "gpu-345m-adam": Case(
        "GPT-2 345M, bf16: fused AdamW, foreach AdamW, bf16 gradients",
        Dims(24, 1024, 16, 1024, 50257, 4),
        ("ours", "ours-foreach", "ours-bf16-grads"),
        device="cuda",
        steps=20,
    ),
}

OURS = ("ours-1f1b", "ours-zb-h1", "ours-zb-h2", "ours-zb-v")
THEIRS = ("torch-1f1b", "torch-1f1b-even", "torch-1f1b-our-stages", "torch-zb-v")

PIPELINES = {
    "pp2": Case(
        "8 layers, width 256, fp32, 2 stages x 1 thread, 8 micro-batches",
        Dims(8, 256, 8, 256, 8192, 2),
        OURS + THEIRS,
        pp=2,
        micro_batches=8,
        steps=2,
    ),
    "pp2-gpt2": Case(
        "GPT-2 small, sequence 256, fp32, 2 stages x 1 thread, 8 micro-batches",
        Dims(12, 768, 12, 256, 50257, 1),
        ("ours-1f1b", "ours-zb-h1", "ours-zb-v", "torch-1f1b"),
        pp=2,
        micro_batches=8,
        steps=1,
    ),
}
