"""The other side of each comparison, each as its own users would write it.

Everybody trains the same dimensions with AdamW, gradient clipping at 1.0 and no dropout. All but the stock one have their
fast options on: fused AdamW, and on a GPU fp32 weights under bf16 autocast, compiled. A contender sets up its process and
gives a function `step(tokens, labels) -> loss` that does one whole optimizer step; tokens and labels are int64
`[micro_batch, seq]` of this rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import Case, Dims
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

Step = Callable[[Tensor, Tensor], float]
Contender = Callable[[Case], AbstractContextManager[Step]]
LR = 1e-4
CLIP = 1.0


@contextmanager
def process(case: Case) -> Iterator[torch.device]:
    """Set torch up as a script under torchrun does it, and yield the device: nothing of this framework, so nothing it tunes."""
    gpu = case.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(case.threads)
    if case.ranks > 1:
        dist.init_process_group("nccl" if gpu else "gloo")
    yield device
    if case.ranks > 1:
        dist.destroy_process_group()


def training_step(model: nn.Module, compute_loss: Callable[[Tensor, Tensor], Tensor], *, bf16: bool) -> Step:
    """Build a step of forward, backward, clipping and AdamW.

    Args:
        model: its parameters are trained; DTensors and plain tensors may stand side by side.
        compute_loss: tokens and labels `[micro_batch, seq]` to the mean loss, a scalar.
        bf16: compute under bf16 autocast, with fp32 weights.

    Returns:
        The step, which gives the loss before the update.
    """
    # DTensors and plain tensors do not mix in one fused call, so each kind is a group of its own.
    parameters = list(model.parameters())
    kinds = [[p for p in parameters if isinstance(p, DTensor) is kind] for kind in (False, True)]
    groups = [group for group in kinds if group]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=LR, weight_decay=0.01, fused=True)
    device = next(model.parameters()).device.type

    def step(tokens: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = compute_loss(tokens, labels)
        loss.backward()
        norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        whole = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
        norm = torch.linalg.vector_norm(torch.stack(whole))
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, CLIP, norm)
        optimizer.step()
        return float(loss.detach())

    return step


def transformers_model(dims: Dims, **options: Any) -> nn.Module:
    """Hugging Face's GPT2LMHeadModel without dropout, else with its defaults unless `options` of its config say otherwise."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = GPT2Config(
        vocab_size=dims.vocab,
        n_positions=dims.seq,
        n_embd=dims.width,
        n_layer=dims.layers,
        n_head=dims.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **options,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model.train()


@contextmanager
def transformers_stock(case: Case) -> Iterator[Step]:
    """GPT2LMHeadModel as it comes, in the loop that most people write, in fp32. It shifts the labels itself."""
    with process(case) as device:
        model = transformers_model(case.dims).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

        def step(tokens: Tensor, _: Tensor) -> float:
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            return float(loss.detach())

        yield step


@contextmanager
def transformers(case: Case, *, ddp: bool = False) -> Iterator[Step]:
    """GPT2LMHeadModel with its fast options; `ddp` wraps it in DistributedDataParallel. It shifts the labels itself."""
    with process(case) as device:
        model = transformers_model(case.dims, use_cache=False, attn_implementation="sdpa").to(device)
        called: nn.Module = DistributedDataParallel(model) if ddp else model
        if device.type == "cuda":
            called = torch.compile(called)  # type: ignore[assignment]
        yield training_step(model, lambda tokens, _: called(input_ids=tokens, labels=tokens).loss, bf16=device.type == "cuda")


class PlainAttention(nn.Module):
    """Self-attention of four linear layers."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.head_width = dims.width // dims.heads
        self.query, self.key, self.value, self.out = (nn.Linear(dims.width, dims.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        # The number of heads is left to the view: under tensor parallelism a rank has its share.
        q, k, v = (f(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dims.width, 4 * dims.width), nn.Linear(4 * dims.width, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class PlainBlock(nn.Module):
    """One pre-norm layer."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dims.width), PlainAttention(dims)
        self.mlp_norm, self.mlp = nn.LayerNorm(dims.width), PlainMLP(dims)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PlainEmbedding(nn.Module):
    """Words and learned positions."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(dims.vocab, dims.width), nn.Embedding(dims.seq, dims.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.word(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))


class PlainGPT(nn.Module):
    """GPT-2 in plain torch modules; DTensor's `parallelize_module` cuts it without a change."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.embedding = PlainEmbedding(dims)
        self.blocks = nn.ModuleList(PlainBlock(dims) for _ in range(dims.layers))
        self.norm = nn.LayerNorm(dims.width)
        self.head = nn.Linear(dims.width, dims.vocab, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # GPT-2's rule: smaller where a layer ends in the residual stream
                ends = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * dims.layers) ** 0.5 if ends else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.tie()

    def tie(self) -> None:
        """Give the output layer the embedding's weight."""
        self.head.weight = self.embedding.word.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


@contextmanager
def plain(case: Case) -> Iterator[Step]:
    """A plain torch loop: the bar that any framework should reach."""
    with process(case) as device:
        model = PlainGPT(case.dims).to(device)
        on_gpu = device.type == "cuda"
        called: nn.Module = torch.compile(model) if on_gpu else model  # type: ignore[assignment]
        yield training_step(model, called, bf16=on_gpu)


def tensor_parallel_model(case: Case, device: torch.device) -> PlainGPT:
    """PlainGPT cut by torch's own tensor parallelism, with its vocabulary-parallel embedding; the logits stay cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh(device.type, (case.tp,))
    model = PlainGPT(case.dims).to(device)
    for parameter in model.parameters():  # every rank starts from rank 0's weights
        dist.broadcast(parameter.data, 0)
    between = Shard(1) if case.sequence_parallel else Replicate()  # of the activations between the parallel layers
    whole = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
    norm: dict[str, ParallelStyle] = {}
    enter: dict[str, ParallelStyle] = {}
    if case.sequence_parallel:
        norm = {"attention_norm": SequenceParallel(), "mlp_norm": SequenceParallel(), "attention": whole, "mlp": whole}
        cut = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=between)
        enter = {"embedding": cut, "norm": SequenceParallel()}
    for block in model.blocks:
        columns = dict.fromkeys(("attention.query", "attention.key", "attention.value", "mlp.up"))
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel(output_layouts=between) for name in ("attention.out", "mlp.down")}
        parallelize_module(block, mesh, {**norm, **plan})
    outer: dict[str, ParallelStyle] = {
        "embedding.word": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, {**outer, **enter})
    model.tie()
    return model


@contextmanager
def dtensor(case: Case) -> Iterator[Step]:
    """Tensor parallelism of torch itself, with its vocabulary-parallel loss."""
    from torch.distributed.tensor.parallel import loss_parallel

    with process(case) as device:
        model = tensor_parallel_model(case, device)

        def compute_loss(tokens: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = model(tokens, labels)
            return loss.full_tensor() if isinstance(loss, DTensor) else loss

        step = training_step(model, compute_loss, bf16=False)

        def parallel_step(tokens: Tensor, labels: Tensor) -> float:
            with loss_parallel():
                return step(tokens, labels)

        yield parallel_step
