"""Table of the flags of nanoGPT, Transformers, torchtitan, LitGPT, DeepSpeed and NeMo, and of what to use here instead.

The names of flags have no leading dashes, and dashes in place of underscores. A name with a dot is first looked up as a whole,
then without the part before its last dot: `training.seq_len` as `seq-len`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CALLED = "is called"
LENGTH_ADVICE = "is not a flag: set the length of training with"

# Our flag -> its names in other frameworks.
NAMES = {
    # sizes of the model
    "--num-layers": "n-layer n-layers num-hidden-layers nlayers depth",
    "--hidden-size": "n-embd d-model dim embed-dim embedding-dim model-dim",
    "--ffn-hidden-size": "intermediate-size d-ff ffn-dim mlp-hidden-dim hidden-dim",
    "--num-attention-heads": "n-head n-heads num-heads nheads",
    "--num-query-groups": "n-kv-heads num-key-value-heads n-query-groups num-kv-heads",
    "--kv-channels": "head-dim head-size",
    "--norm-epsilon": "rms-norm-eps layer-norm-eps layer-norm-epsilon norm-eps",
    "--init-method-std": "initializer-range init-std",
    "--seq-length": "block-size seq-len seqlen sequence-length max-seq-length max-seq-len context-length max-length "
    "model-max-length",
    "--max-position-embeddings": "n-positions n-ctx",
    # batches and length
    "--micro-batch-size": "per-device-train-batch-size per-gpu-train-batch-size device-batch-size local-batch-size mbs "
    "train-micro-batch-size-per-gpu train-micro-batch-size train-batch-size-per-device",
    "--global-batch-size": "train-batch-size gbs total-batch-size effective-batch-size",
    "--train-iters": "max-steps max-iters steps train-steps num-steps total-steps num-iterations max-train-steps iters "
    "num-train-steps iterations training-steps",
    "--eval-iters": "eval-steps-per-run limit-val-batches validation-steps eval.max-iters",
    "--eval-interval": "eval-steps val-check-interval eval-every eval.interval eval-freq validation.freq",
    "--log-interval": "logging-steps log-every log-freq log-every-n-steps print-freq logging-interval",
    "--save-interval": "save-steps save-every checkpoint.interval ckpt-interval checkpointing-steps save-freq",
    # learning rate and optimizer
    "--lr": "learning-rate peak-lr max-lr base-lr lr-max",
    "--min-lr": "lr-min final-lr",
    "--lr-warmup-iters": "warmup-steps warmup-iters num-warmup-steps lr-warmup-steps",
    "--lr-warmup-fraction": "warmup-ratio warmup-fraction warmup-proportion",
    "--lr-decay-style": "lr-scheduler-type lr-scheduler scheduler lr-schedule decay-type",
    "--weight-decay": "wd",
    "--clip-grad": "grad-clip max-grad-norm gradient-clipping gradient-clip-val clip-grad-norm max-norm grad-norm-clip",
    "--adam-beta1": "beta1",
    "--adam-beta2": "beta2",
    "--adam-eps": "adam-epsilon optimizer.eps",
    "--optimizer": "optim optimizer-type optimizer.name",
    # layout
    "--tensor-model-parallel-size": "tp tp-size tensor-parallel tensor-parallel-size tensor-parallel-degree tp-degree "
    "tensor-model-parallel",
    "--pipeline-model-parallel-size": "pp pp-size pipeline-parallel pipeline-parallel-size pipeline-parallel-degree pp-degree "
    "pipe-parallel-size",
    "--context-parallel-size": "cp cp-size context-parallel context-parallel-degree cp-degree",
    "--pipeline-schedule": "pipeline-parallel-schedule pp-schedule",
    "--distributed-backend": "ddp-backend backend dist-backend",
    "--distributed-timeout-minutes": "ddp-timeout",
    "--sequence-parallel": "sp enable-sequence-parallel",
    # precision, memory
    "--recompute-activations, or --recompute-granularity full --recompute-method uniform,": "gradient-checkpointing "
    "activation-checkpointing activation-checkpoint.mode deepspeed-activation-checkpointing use-activation-checkpointing "
    "grad-checkpointing ac-mode",
    "--compile": "torch-compile compile.enable use-compile",
    # files
    "--save": "output-dir out-dir dump-folder checkpoint-dir save-dir checkpoint.folder ckpt-dir checkpoint-path save-path",
    "--load": "initial-checkpoint-dir checkpoint.initial-load-path load-dir ckpt-path",
    "--auto-resume": "resume resume-from-checkpoint resume-from auto-continue",
    "--overwrite": "overwrite-output-dir",
    "--async-save": "async-mode async-checkpoint",
    "--no-save-optim": "save-only-model save-model-only",
    "--keep-last": "save-total-limit checkpoint.keep-latest-k keep-last-n max-checkpoints",
    "--data-path": "data dataset dataset-path data-dir train-file data-file dataset-name dataset-dir train-data-dir",
    "--valid-data-path": "validation-file val-data val-data-path eval-data",
    "--tokenizer-type": "tokenizer",
    "--tokenizer-model": "tokenizer-name tokenizer-path tokenizer-dir tokenizer-name-or-path hf-assets-path",
    "--num-workers": "dataloader-num-workers workers",
    "--split": "validation-split-percentage train-val-split",
    "--seed": "random-seed manual-seed",
    "--tensorboard-dir": "logging-dir tensorboard tb-dir log-dir",
    "--config": "config-file job.config-file config-name yaml",
    "--skip-train": "eval-only only-eval",
}

# End of the error "`--flag` ...", -> names of flags in other frameworks.
ADVICE = {
    "is not a flag: gradients are accumulated over --global-batch-size / (--micro-batch-size x data-parallel ranks) steps": """
        gradient-accumulation-steps grad-accum gradient-accumulation accumulate-grad-batches gradient-accumulation-iters
        grad-accum-steps accumulation-steps""",
    f"{LENGTH_ADVICE} --train-iters, or with --train-samples (one epoch: all samples); tasks/main.py has --epochs": """
        num-train-epochs num-epochs max-epochs n-epochs epoch train.epochs training.epochs""",
    f"{LENGTH_ADVICE} --train-iters, or with --train-samples (tokens / --seq-length)": """
        max-tokens train-tokens num-tokens total-tokens""",
    "is not a flag: data parallelism takes the ranks that the other axes leave": """
        dp dp-size data-parallel-size data-parallel data-parallel-degree data-parallel-replicate-degree
        data-parallel-shard-degree""",
    "is not a flag: torchrun sets the number of processes, as in `torchrun --nproc_per_node 8 pretrain_gpt.py ...`": """
        nproc-per-node nnodes num-nodes num-gpus gpus devices n-gpu num-processes nproc""",
    "is not a flag: each process uses its GPU, or the CPU if there is none": "device accelerator use-cuda cuda no-cuda use-cpu",
    "is not a flag: the model computes in fp32, or with --bf16 or --fp16 in that format": """
        dtype precision mixed-precision torch-dtype mixed-precision-param mixed-precision-reduce amp tf32 fp32""",
    "is not a flag: --preset gives the sizes of a known model, and tools/import_hf.py converts a Hugging Face directory": """
        model model-name-or-path model-name model-path pretrained-model-name-or-path model.name model.flavor model-type
        init-from hf-model flavor""",
    "is not a flag: --hidden-dropout and --attention-dropout set the dropout": """
        dropout resid-pdrop attn-pdrop embd-pdrop resid-dropout""",
    "is not a flag: layers have biases unless --disable-bias-linear and --disable-norm-bias are given": "bias use-bias",
    "is not a flag: the vocabulary's size is the tokenizer's": "n-vocab padded-vocab",
    "is not a flag: the output layer shares the embedding's matrix unless --untie-embeddings-and-output-weights is given": """
        tie-embeddings tie-word-embeddings tie-weights weight-tying""",
    "is not a flag: --lr-decay-style sets how the learning rate decays": "decay-lr",
    "is not a flag: evaluation uses the --micro-batch-size of training": """
        per-device-eval-batch-size eval-batch-size per-gpu-eval-batch-size val-batch-size""",
    "is not a flag: a run trains and evaluates; --skip-train only evaluates, --eval-iters 0 only trains": "do-train do-eval",
    "is not a flag: --eval-interval sets how often to evaluate, --save-interval how often to save": """
        eval-strategy evaluation-strategy save-strategy logging-strategy save-safetensors""",
    "is not a flag: metrics are logged to the console, and to --metrics-path, --tensorboard-dir and --wandb-project": """
        report-to logger logger-name run-name wandb-log use-wandb log-with enable-tensorboard enable-wandb wandb-run-name
        wandb-name""",
    "is not a flag: checkpoints are saved with --save DIR --save-interval N": """
        always-save-checkpoint enable-checkpoint enable-checkpointing save-checkpoints checkpoint.enable""",
    "is not a flag: --use-distributed-optimizer shards the optimizer state (ZeRO-1), and no other stage is available": """
        zero zero-stage zero1 zero-optimization deepspeed deepspeed-config ds-config fsdp use-fsdp""",
    "is not a flag: attention is torch's scaled_dot_product_attention": """
        attn-implementation attn-impl flash-attention flash-attn flash""",
    "is not a flag: adapters (LoRA) are not available; all weights are trained": """
        use-lora lora-r lora-alpha lora-dropout lora peft""",
    "is not a flag: the Hub is not used; tools/export_hf.py writes a directory that Transformers opens": """
        push-to-hub hub-model-id hub-token""",
    "is not a flag: --seed sets the order of samples; --dataloader-type cyclic reshuffles them each epoch": "shuffle",
    "is not a flag: use --rampup-batch-size": "batch-size-warmup",
    "is not a flag: --seed alone determines weights, order of samples and dropout masks": """
        deterministic use-deterministic-algorithms cudnn-deterministic""",
    "is not a flag: --profile-pipeline measures the pipeline, and no other profiler is available": """
        enable-profiling profile-freq profiler""",
}


def _table() -> Mapping[str, str]:
    """Return the message for each name of `NAMES` and `ADVICE`."""
    called = {name: f"{CALLED} {flag} here" for flag, names in NAMES.items() for name in names.split()}
    return MappingProxyType(called | {name: message for message, names in ADVICE.items() for name in names.split()})


MESSAGES: Mapping[str, str] = _table()  # name without leading dashes -> end of the error that begins with it


def find_other_framework(word: str) -> str | None:
    """Return the message for a flag of another framework, given without leading dashes; None for an unknown one."""
    return MESSAGES.get(word) or MESSAGES.get(word.rpartition(".")[2])
