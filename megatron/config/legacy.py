"""Flags of Megatron-LM that the schema does not have: those that change nothing here, and those that are refused.

One row a flag: `flag takes text`, where takes is the number of values that follow it (0, 1 or *). A feature that lands
takes its flag out of REFUSED, in one line, and puts a field into `schema.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Legacy:
    """A known flag that sets nothing. `legal`: the values that change nothing; any other is an error."""

    flag: str
    takes: str
    text: str
    refused: bool
    legal: tuple[str, ...] = ()


# What follows the flag in the note "`--flag` changes nothing: ...".
CHANGES_NOTHING = """
--local_rank 1 ranks come from the environment
--DDP-impl=local|torch 1 there is one data-parallel implementation
--data-impl=mmap|infer 1 datasets are always memory-mapped
--mmap-warmup 0 the operating system reads ahead
--transformer-impl=local 1 there is one implementation of the layers
--use-mcore-models 0 there is one implementation of the layers
--no-contiguous-buffers-in-local-ddp 0 gradients always lie in contiguous buffers
--use-contiguous-buffers-in-ddp 0 gradients always lie in contiguous buffers
--no-masked-softmax-fusion 0 attention is torch's scaled_dot_product_attention
--use-flash-attn 0 attention is torch's scaled_dot_product_attention, which picks a flash kernel where it can
--no-bias-gelu-fusion 0 fusion is left to torch; --compile turns it on
--no-bias-swiglu-fusion 0 fusion is left to torch; --compile turns it on
--no-bias-dropout-fusion 0 fusion is left to torch; --compile turns it on
--no-rope-fusion 0 fusion is left to torch; --compile turns it on
--no-persist-layer-norm 0 there is one LayerNorm
--no-query-key-layer-scaling 0 scores are never scaled by the layer's number, which cancels out anyway
--apply-query-key-layer-scaling 0 it cancels out; scores never overflow here
--attention-softmax-in-fp32 0 the softmax always accumulates in fp32
--fp16-lm-cross-entropy 0 the loss is made in fp32 a few tokens at a time, which takes no more memory
--onnx-safe 1 there is no ONNX path
--no-async-tensor-model-parallel-allreduce 0 the overlap never changes a result
--no-scatter-gather-tensors-in-pipeline 0 it never changes a result
--use-ring-exchange-p2p 0 there is one way to send
--overlap-p2p-communication 0 transfers between stages always overlap with the work
--no-overlap-p2p-communication 0 transfers between stages always overlap with the work
--lazy-mpu-init 1 the mesh is built at once
--use-cpu-initialization 0 initial weights are the same on every device and layout
--no-initialization 0 weights are drawn, then replaced by those of --load
--empty-unused-memory-level 1 memory stays with torch's allocator
--no-load-rng 0 random numbers follow from the seed and the step; no state is kept
--no-save-rng 0 random numbers follow from the seed and the step; no state is kept
--exit-signal-handler 0 always so: SIGTERM, SIGUSR1 or Ctrl-C to any rank saves, and ends the run with status 75
--no-data-sharding 0 every order of samples is shared by all ranks
--timing-log-level 1 there are no timers inside a step
--timing-log-option 1 there are no timers inside a step
--no-barrier-with-level-1-timing 0 there are no timers inside a step
--log-timers-to-tensorboard 0 there are no timers inside a step
--inference-batch-times-seqlen-threshold 1 it concerns inference alone
--max-tokens-to-oom 1 it concerns the text generation server alone
"""

# What follows the flag in the error "`--flag` ...".
REPLACED = """
--batch-size 1 is now --micro-batch-size
--warmup 1 is now --lr-warmup-fraction
--model-parallel-size 1 is now --tensor-model-parallel-size
--checkpoint-activations 0 is now --recompute-granularity full --recompute-method uniform
--checkpoint-num-layers 1 is now --recompute-num-layers
--activations-checkpoint-method 1 is now --recompute-method, with --recompute-granularity full
--activations-checkpoint-num-layers 1 is now --recompute-num-layers
--distribute-checkpointed-activations 0 is now --distribute-saved-activations
--standalone-embedding-stage 0 is now --pipeline-stage-layers 0 N N ..., the layers of each stage from the first to the last
--adlr-autoresume 0 needs a private library; use --auto-resume
--adlr-autoresume-interval 1 needs a private library; use --auto-resume
--img-dim 1 is not available: there are no vision models here
"""

LATER = {
    "is not available yet; leave it out: the residual stream has the type of the weights": """
        --fp32-residual-connection 0
        --embedding-weights-in-fp32 0""",
    "is not available; --recompute-granularity selective is that of core_attn, and full that of whole layers": """
        --recompute-modules *""",
    "is not available: one seed gives the same weights on every data-parallel rank": """
        --data-parallel-random-init 0""",
    "belongs to retrieval with BERT, which is not available": """
        --bert-load 1
        --output-bert-embeddings 0
        --bert-embedder-type 1""",
    "belongs to encoder-decoder models, which are not available": """
        --decoder-num-layers 1
        --decoder-seq-length 1
        --pipeline-model-parallel-split-rank 1""",
    "belongs to mixtures of experts, which are not available": """
        --num-experts 1
        --expert-model-parallel-size 1
        --moe-router-topk 1
        --moe-grouped-gemm 0""",
    "belongs to FP8, which is not available; use --bf16": """
        --fp8-e4m3 0
        --fp8-hybrid 0
        --fp8-format 1
        --no-fp8-wgrad 0
        --fp8-margin 1
        --fp8-interval 1
        --fp8-amax-history-len 1
        --fp8-amax-compute-algo 1""",
    "belongs to retrieval models (ICT, biencoder), which are not available": """
        --ict-head-size 1
        --biencoder-projection-dim 1
        --biencoder-shared-query-context-model 0
        --ict-load 1
        --titles-data-path 1
        --query-in-block-prob 1
        --use-one-sent-docs 0
        --evidence-data-path 1
        --retriever-report-topk-accuracies *
        --retriever-score-scaling 0
        --retriever-seq-length 1
        --sample-rate 1
        --block-data-path 1
        --embedding-path 1
        --indexer-batch-size 1
        --indexer-log-interval 1""",
    "belongs to vision models, which are not available": """
        --num-classes 1
        --img-h 1
        --img-w 1
        --num-channels 1
        --patch-dim 1
        --classes-fraction 1
        --data-per-class-fraction 1
        --head-lr-mult 1
        --vision-pretraining 0
        --vision-pretraining-type 1
        --vision-backbone-type 1
        --swin-backbone-type 1
        --mask-type 1
        --mask-factor 1
        --iter-per-epoch 1
        --dino-local-img-size 1
        --dino-local-crops-number 1
        --dino-head-hidden-size 1
        --dino-bottleneck-size 1
        --dino-freeze-last-layer 1
        --dino-norm-last-layer 0
        --dino-warmup-teacher-temp 1
        --dino-teacher-temp 1
        --dino-warmup-teacher-temp-epochs 1""",
    "belongs to Retro, which is not available": """
        --retro-workdir 1
        --retro-add-retriever 0
        --retro-cyclic-train-iters 1
        --retro-encoder-layers 1
        --retro-encoder-hidden-dropout 1
        --retro-encoder-attention-dropout 1
        --retro-num-neighbors 1
        --retro-num-retrieved-chunks 1
        --retro-return-doc-ids 0""",
}


def _rows(table: str, refused: bool, text: str = "") -> list[Legacy]:
    rows = []
    for line in table.strip().splitlines():
        spelled, takes, *own = line.split(maxsplit=2)
        flag, _, legal = spelled.partition("=")
        rows.append(Legacy(flag, takes, own[0] if own else text, refused, tuple(legal.split("|")) if legal else ()))
    return rows


def _table() -> Mapping[str, Legacy]:
    rows = _rows(CHANGES_NOTHING, refused=False) + _rows(REPLACED, refused=True)
    for text, flags in LATER.items():
        rows += _rows(flags, refused=True, text=text)
    return MappingProxyType({row.flag.replace("_", "-"): row for row in rows})


LEGACY: Mapping[str, Legacy] = _table()  # keyed by the spelling with dashes only
