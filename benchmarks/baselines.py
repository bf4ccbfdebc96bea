"""The other side of each comparison, each as its own users would write it and with its fast options on.

Everybody trains the same dimensions with AdamW (fused), gradient clipping at 1.0 and no dropout. On a GPU the weights are
fp32 under bf16 autocast and the model is compiled. A contender is a function `step(tokens, labels) -> loss` that does one
whole optimizer step; tokens and labels are int64 `[micro_batch, seq]` of this rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import Case, Dims
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from megatron.mesh.launch import Job

Step = Callable[[Tensor, Tensor], float]
LR = 1e-4
CLIP = 1.0


def training_step(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], *, bf16: bool) -> Step:
    """Forward, backward, clip and AdamW of a model whose loss is `loss_of(tokens, labels)`."""
    # DTensors and plain tensors do not mix in one fused call, so each kind is a group of its own.
    parameters = list(model.parameters())
    kinds = [[p for p in parameters if isinstance(p, DTensor) is kind] for kind in (False, True)]
    groups = [group for group in kinds if group]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=LR, weight_decay=0.01, fused=True)
    device = next(model.parameters()).device.type

    def step(tokens: Tensor, labels: Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(tokens, labels)
        loss.backward()
        norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        whole = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
        norm = torch.linalg.vector_norm(torch.stack(whole))
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, CLIP, norm)
        optimizer.step()
        return float(loss.detach())

    return step


def transformers_model(dims: Dims) -> nn.Module:
    """Hugging Face's GPT2LMHeadModel, on torch's scaled_dot_product_attention."""
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
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model.train()


def transformers(case: Case, job: Job, *, ddp: bool = False) -> Step:
    """GPT2LMHeadModel with its own loss; `ddp` wraps it in DistributedDataParallel. It shifts the labels itself."""
    model = transformers_model(case.dims).to(job.device)
    on_gpu = job.device.type == "cuda"
    called: nn.Module = DistributedDataParallel(model) if ddp else model
    if on_gpu:
        called = torch.compile(called)  # type: ignore[assignment]
    return training_step(model, lambda tokens, _: called(input_ids=tokens, labels=tokens).loss, bf16=on_gpu)


class PlainAttention(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.head_width = dims.width // dims.heads
        self.query, self.key, self.value, self.out = (nn.Linear(dims.width, dims.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        # The number of heads is left to the view: under tensor parallelism a rank has its share.
        q, k, v = (f(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dims.width, 4 * dims.width), nn.Linear(4 * dims.width, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class PlainBlock(nn.Module):
    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dims.width), PlainAttention(dims)
        self.mlp_norm, self.mlp = nn.LayerNorm(dims.width), PlainMLP(dims)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PlainEmbedding(nn.Module):
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
        self.head.weight = self.embedding.word.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def plain(case: Case, job: Job) -> Step:
    """A plain torch loop: the bar that any framework should reach."""
    model = PlainGPT(case.dims).to(job.device)
    on_gpu = job.device.type == "cuda"
    called: nn.Module = torch.compile(model) if on_gpu else model  # type: ignore[assignment]
    return training_step(model, called, bf16=on_gpu)


def dtensor(case: Case, job: Job) -> Step:
    """PlainGPT cut by torch's own tensor parallelism, with its vocabulary-parallel embedding and loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh = init_device_mesh(job.device.type, (case.tp,))
    model = PlainGPT(case.dims).to(job.device)
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

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = model(tokens, labels)
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    step = training_step(model, loss_of, bf16=False)

    def parallel_step(tokens: Tensor, labels: Tensor) -> float:
        with loss_parallel():
            return step(tokens, labels)

    return parallel_step
