"""A small trained GPT in a checkpoint, its export, and log-probabilities that only transformers computes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.save import save
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.command_line.saved import to_json
from megatron.config.resolve import resolve_model
from megatron.config.schema import ModelSettings, RunSettings
from megatron.contract import StagePart
from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.restore import OpenedModel, open_pipeline
from megatron.interop.hf_export import export_weights
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.model.build import MODELS
from megatron.model.init import initialize
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.tasks.scoring import batch_windows
from megatron.tasks.windows import Window

POSITIONS = 40
VOCABULARY = 257  # of bytes: prime, so that no tensor-parallel size divides it
SMALL_GPT: dict[str, Any] = dict(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    max_position_embeddings=POSITIONS,
    vocab_size=VOCABULARY,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
LLAMA: dict[str, Any] = dict(
    SMALL_GPT,
    normalization="RMSNorm",
    position_embedding_type="rope",
    activation="swiglu",
    add_bias_linear=False,
    num_query_groups=2,
    untie_embeddings_and_output_weights=True,
)


def sentences(count: int, seed: int) -> list[str]:
    """Make sentences of three words, one of them frequent, so that a small model soon guesses some."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(("ma", "ma", "ma", "lo", "tun")) for _ in range(draw.randint(4, 8))) for _ in range(count)]


def train_and_export(root: Path, steps: int, **change: Any) -> Path:
    """Train a small model on sentences of bytes, save it to root/run, and export a GPT to root/hf.

    Args:
        root: a directory.
        steps: of Adam.
        change: settings that differ from SMALL_GPT.

    Returns:
        `root`.
    """
    config = resolve_model(ModelSettings(**{**SMALL_GPT, **change}))
    model = MODELS[config.architecture](config, StagePart(range(config.num_layers), True, True), TensorParallel.alone())
    initialize(model, config, 7)
    text = ByteTokenizer().tokenize(". ".join(sentences(400, 1)))
    adam, draw = torch.optim.Adam(model.parameters(), lr=4e-3), random.Random(2)
    for _ in range(steps):
        starts = [draw.randrange(len(text) - POSITIONS - 1) for _ in range(8)]
        loss = model(None, batch_windows([Window(text[s : s + POSITIONS + 1], POSITIONS) for s in starts], torch.device("cpu")))
        (loss.sum / loss.tokens).backward()
        adam.step()
        adam.zero_grad()
    content = {"model": ModuleWeights(model)}
    saved = to_json(RunSettings(model=config))
    save(root / "run", steps, content, Mesh.single(), config=saved, assets=ByteTokenizer().files())
    if config.architecture == "gpt":
        export_weights(find_checkpoint(root / "run"), root / "hf")
        ByteTokenizer().hf_files(root / "hf", POSITIONS)
    return root


def open_on_ranks(root: str, tp: int, pp: int) -> tuple[OpenedModel[Any], Mesh]:
    """Open a checkpoint on as many ranks as there are; those that tp and pp leave over are data-parallel.

    Args:
        root: the directory of checkpoints.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
    """
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh.build(Grid(tp=tp, pp=pp, dp=world // (tp * pp)), dist.get_rank() if world > 1 else 0)
    return open_pipeline(root, mesh), mesh


class Reference:
    """Log-probabilities by transformers from the exported directory: one token, one context, one pass at a time."""

    def __init__(self, root: Path) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf").float().eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(root / "hf")

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def log_prob(self, context: list[int], token: int) -> tuple[float, bool]:
        """Return the log-probability of a token after a context, and whether it is the most probable one."""
        logits = self.model(torch.tensor([context])).logits[0, -1].double()
        return float(logits.log_softmax(-1)[token]), int(logits.argmax()) == token

    def all_after_first(self, tokens: list[int], seq_length: int, overlap: int) -> list[float]:
        """Return the log-probability of every token after the first.

        Args:
            tokens: of one text.
            seq_length: positions of a window.
            overlap: windows begin at its multiples; a token counts in the first one that reaches it.
        """
        found = []
        for at in range(1, len(tokens)):
            start = 0
            while at > start + seq_length:
                start += overlap
            found.append(self.log_prob(tokens[start:at], tokens[at])[0])
        return found
