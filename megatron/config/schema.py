"""What a run is: frozen dataclasses, the one source of defaults, flags, help, TOML and the saved config.

Each field is written with `option(default, help, ...)`. `config/command_line/` derives everything a user types from it:
the field `tensor_model_parallel_size` of `LayoutConfig` is the flag `--tensor-model-parallel-size` and the TOML key
`tensor-model-parallel-size` under `[layout]`. Names, defaults and meanings are Megatron-LM 23.06's where it has the
setting. `None` means "derived": `config/rules.py` fills it in, so code that runs a model only sees resolved values.

Imports no torch: a configuration can be read, checked and printed anywhere. Longer than 400 lines because all settings of a
run stand in it, a line or two each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from megatron.config.tasks import TASKS
from megatron.pipeline.schedules.schedule import DEFAULT, DEFAULT_WITH_CHUNKS, SCHEDULES


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = "",
    off: str | None = None,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    nargs: str | None = None,
    values: Mapping[str, Any] | None = None,
    yielding: tuple[str, ...] = (),
    metavar: str | None = None,
    bare: str | None = None,
) -> Any:
    """A dataclass field that knows its flag.

    flag: the spelling, where it is not the field's name with dashes; None for a field that no flag sets.
    off: for a bool that is on by default, the flag that turns it off.
    aliases: other spellings of the same flag. values: further flags that take no argument and set this field to a
    value (`--use-rotary-position-embeddings` sets `position_embedding_type` to "rope").
    yielding: those of `values` that hold only where nothing else sets the field to something of its own.
    choices: the legal strings. nargs: argparse's, for a field that takes several values.
    bare: for a flag whose value may be left out, what the flag alone sets; in TOML, what `true` sets.
    """
    return field(
        default=default,
        metadata=dict(
            help=help,
            flag=flag,
            off=off,
            aliases=aliases,
            choices=choices,
            nargs=nargs,
            values=values or {},
            yielding=yielding,
            metavar=metavar,
            bare=bare,
        ),
    )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Together with the weights this is all that inference and export need."""

    num_layers: int | None = option(None, "transformer layers", aliases=("--encoder-num-layers",))
    hidden_size: int | None = option(None, "width of the residual stream")
    ffn_hidden_size: int | None = option(None, "width of the MLP; default 4 x hidden, with --swiglu 2/3 of that in steps of 64")
    num_attention_heads: int | None = option(None, "query heads")
    num_query_groups: int | None = option(
        None,
        "key-value heads (grouped-query attention); default one per query head",
        values={"--group-query-attention": 1},
        yielding=("--group-query-attention",),
    )
    kv_channels: int | None = option(None, "width of one head; default hidden / heads")
    max_position_embeddings: int | None = option(None, "longest sequence the model can see")
    position_embedding_type: str = option(
        "learned_absolute",
        "how positions enter: a learned table, rotary (RoPE, arXiv 2104.09864), or not at all",
        choices=("learned_absolute", "rope", "none"),
        values={"--use-rotary-position-embeddings": "rope", "--no-position-embedding": "none"},
        yielding=("--no-position-embedding",),
    )
    rotary_percent: float = option(1.0, "share of each head that RoPE turns")
    rotary_interleaved: bool = option(False, "RoPE turns neighbouring channels as a pair, not the halves of a head")
    rotary_base: float = option(10000.0, "base of the RoPE frequencies", aliases=("--rope-theta",))
    normalization: str = option("LayerNorm", "normalisation layer", choices=("LayerNorm", "RMSNorm"))
    layernorm_epsilon: float = option(1e-5, "added to the variance", aliases=("--norm-epsilon",))
    apply_layernorm_1p: bool = option(False, "store the norm's weight as gamma - 1, so that weight decay pulls it to 1")
    add_norm_bias: bool = option(True, "a bias in every LayerNorm", off="--disable-norm-bias")
    add_bias_linear: bool = option(True, "a bias in every linear layer", off="--disable-bias-linear")
    activation: str = option(
        "gelu",
        "of the MLP: gelu (tanh approximation, as Megatron's fused kernel and GPT-2), gelu-exact (erf), squared-relu, swiglu",
        choices=("gelu", "gelu-exact", "squared-relu", "swiglu"),
        values={"--openai-gelu": "gelu", "--squared-relu": "squared-relu", "--swiglu": "swiglu"},
    )
    architecture: str = option("gpt", "gpt or bert; the program's", flag=None, choices=("gpt", "bert"))
    bert_binary_head: bool = option(
        True,
        "of BERT: token types, pooler and the head that tells whether the segments were swapped",
        off="--bert-no-binary-head",
    )
    untie_embeddings_and_output_weights: bool = option(False, "give the output layer its own matrix")
    apply_residual_connection_post_layernorm: bool = option(False, "take the residual from the norm's output")
    attention_dropout: float = option(0.1, "dropout probability of the attention weights")
    hidden_dropout: float = option(0.1, "dropout probability of embedding, attention and MLP output")
    fused_attention_dropout: bool = option(
        False,
        "let the fused attention kernel draw the attention dropout: faster, but the mask then depends on the layout",
    )
    init_method_std: float = option(0.02, "standard deviation of the initial weights")
    init_method_xavier_uniform: bool = option(False, "initial weights from Xavier's uniform distribution")
    make_vocab_size_divisible_by: int = option(
        128, "each tensor-parallel rank's share of the vocabulary is padded to a multiple of this"
    )
    vocab_size: int | None = option(None, "true size of the vocabulary, from the tokenizer", flag=None)
    task_head: str | None = option(
        None,
        "the head of a task, in place of those of pretraining",
        flag=None,
        choices=("classification", "choice", "span", "tags"),
    )
    labels: tuple[str, ...] = option((), "names of the classes or choices that a task's head tells apart", flag=None)

    @property
    def segment_kinds(self) -> int:
        """Rows of the token type table; 0 where there is none."""
        return 2 if self.architecture == "bert" and self.bert_binary_head else 0

    @property
    def predicts_words(self) -> bool:
        """Whether there is an output layer over the vocabulary."""
        return self.task_head is None

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding's matrix."""
        return self.predicts_words and not self.untie_embeddings_and_output_weights

    @property
    def predicts_order(self) -> bool:
        """Whether there is BERT's head that tells if two segments were swapped."""
        return self.segment_kinds > 0 and self.predicts_words

    @property
    def pooled(self) -> bool:
        """Whether there is a pooler: a dense layer and tanh on the first token."""
        return self.predicts_order or self.task_head in ("classification", "choice")

    @property
    def rows(self) -> int:
        """Rows of one sample: a choice has one for each of its answers."""
        return len(self.labels) if self.task_head == "choice" else 1

    @property
    def task_outputs(self) -> int:
        """Numbers that a task's head gives: for a choice one of each row, for a span its start and its end."""
        return {"choice": 1, "span": 2}.get(self.task_head or "", len(self.labels))

    # After config/rules.py has resolved them, the derived sizes are integers; these spare every reader the None test.

    def size(self, name: str) -> int:
        """The resolved integer field `name`; ValueError while it is still open."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"ModelConfig.{name} is not resolved yet")
        return int(value)


@dataclass(frozen=True)
class LayoutConfig:
    """How the ranks are arranged. Data parallelism takes what the other axes leave of the world."""

    tensor_model_parallel_size: int = option(1, "ranks that share each layer (tp); keep them within a node")
    pipeline_model_parallel_size: int = option(1, "ranks that share the depth (pp)")
    context_parallel_size: int = option(1, "ranks that share each sequence (cp)")
    sequence_parallel: bool = option(False, "split norms and dropout over the sequence within tp (arXiv 2205.05198)")
    pipeline_schedule: str | None = option(
        None,
        f"order of work in the pipeline; default {DEFAULT}, or {DEFAULT_WITH_CHUNKS} with virtual stages",
        choices=tuple(SCHEDULES),
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers of one virtual stage, about: each rank has num-layers / (pp x this) of them, rounded down"
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "virtual stages of each rank, in place of --num-layers-per-virtual-pipeline-stage"
    )
    pipeline_stage_layers: tuple[int, ...] = option(
        (), "layers of each stage, first to last; default cut so that the ranks have equal work, the head's included", nargs="*"
    )
    pipeline_model_parallel_layout: str | None = option(
        None,
        "the same, drawn: stages between |, of E (embedding), t (layer), L (loss); x*3 is xxx, (tt|)*2 is tt|tt|",
        metavar='"Et*3|(tt|)*2L"',
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "layers of the first pipeline rank, in all its stages; the other ranks share the rest evenly"
    )
    decoder_last_pipeline_num_layers: int | None = option(None, "layers of the last pipeline rank, likewise")
    account_for_embedding_in_pipeline_split: bool = option(
        False, "even stages, in which the embedding counts as a layer: the first one has one less"
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "even stages, in which output layer and loss count as a layer: the last one has one less"
    )
    use_distributed_optimizer: bool = option(
        False, "each data-parallel rank keeps a slice of main weights and optimizer state (ZeRO-1, arXiv 1910.02054)"
    )
    overlap_grad_reduce: bool = option(
        False, "sum gradients over data-parallel ranks bucket by bucket, while the backward pass makes the others"
    )
    overlap_param_gather: bool = option(
        False, "of the distributed optimizer: gather new weights bucket by bucket, while the next forward pass runs"
    )
    ddp_bucket_size: int = option(40_000_000, "elements of a bucket of gradients; a larger parameter has one of its own")
    distributed_backend: str | None = option(
        None, "communication library; default nccl with one GPU per rank, else gloo", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: float = option(10.0, "a collective that takes longer is a failure")
    hang_timeout_seconds: float = option(
        20.0,
        "pipeline work counts as hanging after this, or after three times the longest of its kind so far, the first under "
        "--compile excepted; 0: only after --distributed-timeout-minutes",
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """Text to token ids."""

    tokenizer_type: str | None = option(
        None,
        "how text becomes tokens",
        choices=(
            "GPT2BPETokenizer",
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "HuggingFaceTokenizer",
            "ByteTokenizer",
            "NullTokenizer",
        ),
    )
    vocab_file: str | None = option(None, "vocab.json of GPT-2 BPE, vocab.txt of BERT")
    merge_file: str | None = option(None, "merges.txt of GPT-2 BPE")
    tokenizer_model: str | None = option(None, "SentencePiece model; or a tokenizer.json or its directory")
    vocab_size: int | None = option(None, "number of ids, for NullTokenizer only")
    vocab_extra_ids: int = option(0, "additional <extra_id_N> tokens")
    eod_token: str | None = option(None, "the token that ends a document, by its text or its id; default the tokenizer's own")
    bos_token: str | None = option(
        None, "the first token of a document, by its text or its id; preprocessing puts it before each"
    )


@dataclass(frozen=True)
class DataConfig:
    """From indexed datasets to micro-batches."""

    data_path: tuple[str, ...] = option((), "PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...", nargs="*")
    train_data_path: tuple[str, ...] = option((), "the same, for training alone", nargs="*")
    valid_data_path: tuple[str, ...] = option((), "the same, for validation alone", nargs="*")
    test_data_path: tuple[str, ...] = option((), "the same, for testing alone", nargs="*")
    data_args_path: str | None = option(None, "a file that holds what would follow --data-path", metavar="FILE")
    per_split_data_args_path: str | None = option(
        None,
        "a JSON file with what would follow --train-data-path, --valid-data-path and --test-data-path, as lists under the keys "
        "train, valid and test",
        metavar="FILE",
    )
    mock_data: bool = option(
        False, "made-up samples that follow from --seed, in place of data: the losses say nothing, but the run is a real one"
    )
    split: str = option("969,30,1", "shares of training, validation and test documents")
    data_cache_path: str | None = option(None, "directory for built sample indices; default `cache` beside the data")
    seq_length: int | None = option(None, "tokens per sample", aliases=("--encoder-seq-length",))
    num_workers: int = option(2, "batches that are read ahead; 0 reads in the training loop")
    dataloader_type: str = option(
        "single", "single: in dataset order; cyclic: reshuffled each epoch", choices=("single", "cyclic")
    )
    reset_position_ids: bool = option(False, "count positions from 0 again after each end of document")
    reset_attention_mask: bool = option(False, "no attention across an end of document")
    mask_prob: float = option(0.15, "of BERT: share of the tokens that are to be guessed")
    short_seq_prob: float = option(0.1, "of BERT: share of the samples that are shorter than --seq-length, at random")
    eod_mask_loss: bool = option(False, "do not count the prediction made from an end of document")


@dataclass(frozen=True)
class BatchConfig:
    """How much is trained, in which portions."""

    micro_batch_size: int | None = option(None, "samples per rank and forward pass")
    global_batch_size: int | None = option(None, "samples per step over all ranks; default micro batch x data-parallel size")
    rampup_batch_size: tuple[int, ...] = option(
        (), "START INCREMENT SAMPLES: grow the global batch by INCREMENT from START over SAMPLES samples", nargs="*"
    )
    decrease_batch_size_if_needed: bool = option(
        False, "where the ranks cannot share a global batch in whole micro-batches, take the largest smaller one that they can"
    )
    batch_multiple: int = option(1, "what --decrease-batch-size-if-needed takes multiples of", flag=None)
    step_batch_size_schedule: tuple[str, ...] = option(
        (),
        "0:SIZE TOKENS:SIZE ...: the global batch has SIZE samples from so many trained tokens on, in place of "
        "--global-batch-size, which is the last; numbers may end in K, M, B or T",
        nargs="*",
        metavar="TOKENS:SIZE",
    )
    batch_size_steps: tuple[int, ...] = option(
        (), "samples and global batch size of each entry of --step-batch-size-schedule, in turn", flag=None
    )
    train_iters: int | None = option(None, "steps to train")
    train_samples: int | None = option(None, "samples to train, instead of steps")
    skip_train_iterations: tuple[str, ...] = option(
        (),
        "iterations N and ranges A-B that read their samples and make no update",
        nargs="*",
        aliases=("--iterations-to-skip",),
    )
    exit_interval: int | None = option(None, "save and exit when the iteration is a multiple of this")
    exit_duration_in_mins: float | None = option(None, "save and exit before this many minutes have passed")
    stop_file: str | None = option(None, "save and exit when this file appears, and remove it; default `stop` in --save")
    seed: int = option(1234, "the one seed: weights, sample order and dropout all follow from it")
    loss_average: str = option(
        "token",
        "token: mean over all tokens of the global batch that count; micro-batch: Megatron-LM's mean of micro-batch means",
        choices=("token", "micro-batch"),
        values={"--calculate-per-token-loss": "token"},
    )
    compile: bool = option(False, "compile the transformer layers with torch.compile; pays off at tensor-parallel size 1")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: str = option("adam", "adam is AdamW, with decoupled decay", choices=("adam", "sgd"))
    lr: float | None = option(None, "peak learning rate")
    min_lr: float = option(0.0, "floor of the learning rate")
    decoupled_lr: float | None = option(None, "peak learning rate of word embedding and output layer; default --lr")
    decoupled_min_lr: float | None = option(None, "floor of --decoupled-lr; default --min-lr")
    lr_decay_style: str = option(
        "linear",
        "shape after warm-up; WSD: at --lr until a decay at the end (warm-up, stable, decay; arXiv 2404.06395)",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_wsd_decay_style: str = option(
        "exponential", "shape of the decay of WSD", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = option(None, "of WSD: steps of the decay, the last ones of --lr-decay-iters")
    lr_wsd_decay_samples: int | None = option(None, "of WSD: samples of the decay, the last ones of --lr-decay-samples")
    lr_decay_iters: int | None = option(None, "steps until --min-lr; default --train-iters")
    lr_decay_samples: int | None = option(None, "samples until --min-lr; default --train-samples")
    lr_warmup_fraction: float | None = option(None, "share of the decay length that is warm-up")
    lr_warmup_iters: int = option(0, "steps of linear warm-up")
    lr_warmup_samples: int = option(0, "samples of linear warm-up")
    lr_warmup_init: float = option(0.0, "learning rate that the warm-up begins with")
    weight_decay: float = option(
        0.01, "of matrices, not of biases and norms; decoupled with adam, part of the gradient with sgd"
    )
    start_weight_decay: float | None = option(None, "weight decay at the start, with a --weight-decay-incr-style")
    end_weight_decay: float | None = option(None, "weight decay at the end, with a --weight-decay-incr-style")
    weight_decay_incr_style: str = option(
        "constant", "shape of the weight decay over time", choices=("constant", "linear", "cosine")
    )
    clip_grad: float = option(1.0, "largest global gradient norm; 0 turns clipping off")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    adam_eps: float = option(1e-8, "added to the root of the second moment")
    adam_kernel: str = option(
        "fused", "whose AdamW: torch's fused or foreach one, or apex's FusedAdam", choices=("fused", "foreach", "apex")
    )
    sgd_momentum: float = option(0.9, "momentum of sgd")
    override_opt_param_scheduler: bool = option(
        False,
        "on resume take the schedule of learning rate and weight decay from the command line; where it differs from the "
        "checkpoint's, one of the two flags must be given",
        aliases=("--override-lr-scheduler",),
        flag="--override-opt_param-scheduler",
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "on resume take the schedule from the checkpoint, whatever the command line says",
        aliases=("--use-checkpoint-lr-scheduler",),
        flag="--use-checkpoint-opt_param-scheduler",
    )
    on_nonfinite: str = option("skip", "what a NaN or Inf gradient does", choices=("skip", "abort"))
    max_consecutive_skips: int = option(50, "stop after this many skipped steps in a row")


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats. Main weights and optimizer state are always fp32."""

    bf16: bool = option(False, "compute in bfloat16")
    fp16: bool = option(False, "compute in float16, with a loss scale")
    loss_scale: float | None = option(None, "constant loss scale; default, and 0, dynamic with --fp16, else 1")
    initial_loss_scale: float = option(4294967296.0, "where the dynamic loss scale begins")
    min_loss_scale: float = option(1.0, "the dynamic loss scale never falls below this")
    loss_scale_window: float = option(1000.0, "updates in a row after which the dynamic loss scale doubles")
    hysteresis: int = option(2, "overflows since the last doubling after which each one halves the dynamic loss scale")
    grad_reduce_in_bf16: bool = option(
        False,
        "of --bf16: accumulate and reduce gradients in bfloat16 too, in half the bytes; default in fp32",
        values={"--accumulate-allreduce-grads-in-fp32": False},
    )
    gradient_accumulation_fusion: bool = option(
        True,
        "on a GPU with 16-bit weights, fp32 gradients and uncompiled layers: add weight gradients within their matrix product",
        off="--no-gradient-accumulation-fusion",
    )

    @property
    def two_bytes(self) -> bool:
        """Whether the model's weights and activations are 16-bit numbers."""
        return self.bf16 or self.fp16


@dataclass(frozen=True)
class MemoryConfig:
    """Which activations are kept for the backward pass, and which are computed again."""

    recompute_granularity: str | None = option(
        None,
        "run again in the backward pass instead of keeping: selective: the core attention; full: whole layers",
        choices=("full", "selective"),
        values={"--recompute-activations": "selective"},
    )
    recompute_method: str | None = option(
        None,
        "of full: uniform: all layers, in chunks of --recompute-num-layers; block: that many first layers of each stage",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = option(1, "layers of a chunk (uniform), or layers of each stage that are run again (block)")
    distribute_saved_activations: bool = option(
        False, "of full: each tensor-parallel rank keeps its share of what a chunk starts from"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run's state is kept, and where it comes from."""

    save: str | None = option(None, "directory that checkpoints go to")
    save_interval: int | None = option(None, "steps between checkpoints")
    save_interval_mins: float | None = option(None, "minutes between checkpoints, beside --save-interval or instead of it")
    async_save: bool = option(False, "write checkpoints in the background, from a copy in host memory, while training goes on")
    on_save_error: str = option(
        "stop", "a full or failing disk ends the run, or costs it that checkpoint alone", choices=("stop", "continue")
    )
    load: str | None = option(
        None,
        "directory of checkpoints to start from: SAVE of another run, or one iter_ directory; the directory of --save itself "
        "may be empty yet",
    )
    load_iteration: int | None = option(None, "which iteration of --load; default the latest", aliases=("--ckpt-step",))
    exit_on_missing_checkpoint: bool = option(
        False, "an error, not a fresh start, where --load is the directory of --save and holds nothing"
    )
    auto_resume: bool = option(False, "go on from the newest complete checkpoint of --save, or start fresh and say so")
    overwrite: bool = option(
        False,
        "start a new run where --save holds checkpoints. They stay, and can be gone on with, until the new run's first "
        "checkpoint is whole; then they are removed, and nothing else: one with a file that no run wrote is refused. The old "
        "metrics.jsonl becomes metrics.1.jsonl",
    )
    allow_data_change: bool = option(False, "on resume take the training data from the command line, though they changed")
    finetune: bool = option(False, "take only the weights of --load: iteration 0, new optimizer, data from the start")
    no_load_optim: bool = option(False, "start with a new optimizer state")
    no_save_optim: bool = option(False, "leave the optimizer state out of checkpoints")
    use_checkpoint_args: bool = option(
        False, "take the model's shape, the sequence length and the tokenizer from the checkpoint, where no flag gives them"
    )
    keep_last: int | None = option(None, "how many of the newest checkpoints stay; default all")
    keep_every: int | None = option(None, "checkpoints at multiples of this stay for ever")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    eval_iters: int = option(100, "steps of one evaluation")
    eval_interval: int = option(1000, "training steps between evaluations; 0: none before training has ended")
    skip_train: bool = option(False, "only evaluate; --save then takes metrics alone, also beside the run that saves there")


@dataclass(frozen=True)
class LogConfig:
    """What a run tells."""

    log_interval: int = option(100, "steps between console and metrics lines")
    metrics_path: str | None = option(None, "JSON lines, one object a line; default metrics.jsonl in --save")
    tensorboard_dir: str | None = option(None, "directory for TensorBoard")
    tensorboard_log_interval: int = option(1, "steps between TensorBoard points")
    tensorboard_queue_size: int = option(1000, "points held before they are written")
    wandb_project: str | None = option(
        None, "project of Weights & Biases to log to, beside TensorBoard and under its tags; needs the extra `wandb`"
    )
    wandb_exp_name: str | None = option(None, "name of the run in W&B; default one that W&B makes up")
    wandb_entity: str | None = option(None, "user or team of W&B; default the user's own")
    wandb_save_dir: str | None = option(None, "directory for W&B's files; default `wandb` in --save, else here")
    log_params_norm: bool = option(False, "also log the norm of the parameters")
    log_num_zeros_in_grad: bool = option(False, "also log the number of zeros in the gradient")
    log_learning_rate_to_tensorboard: bool = option(
        True,
        "learning rate to TensorBoard",
        off="--no-log-learnig-rate-to-tensorboard",
        aliases=("--no-log-learning-rate-to-tensorboard",),
    )
    log_loss_scale_to_tensorboard: bool = option(
        True,
        "loss scale to TensorBoard",
        off="--no-log-loss-scale-to-tensorboard",
        aliases=("--disable-log-loss-scale-to-tensorboard",),
    )
    log_batch_size_to_tensorboard: bool = option(False, "batch size to TensorBoard")
    log_world_size_to_tensorboard: bool = option(False, "world size to TensorBoard")
    log_memory_to_tensorboard: bool = option(False, "memory use to TensorBoard")
    log_validation_ppl_to_tensorboard: bool = option(False, "validation perplexity to TensorBoard")
    profile_pipeline: str | None = option(
        None,
        "measure the pipeline's actions and write times and a picture to DIR; default --save, else ./pipeline_profile",
        metavar="[DIR]",
        bare="",
    )
    peak_tflops: float | None = option(
        None,
        "dense peak of one device in TFLOP/s, for MFU; default from the device's name. MFU counts attention over the whole "
        "square, mfu_causal its causal half, as NVIDIA's tables do",
    )


@dataclass(frozen=True)
class TaskConfig:
    """Of tasks/main.py: evaluation and fine-tuning."""

    task: str | None = option(None, "what to evaluate or to fine-tune on", choices=tuple(TASKS))
    train_data: tuple[str, ...] = option((), "files (of RACE directories) to fine-tune on", nargs="*")
    valid_data: tuple[str, ...] = option((), "files (of RACE directories) to evaluate", nargs="*")
    epochs: int | None = option(None, "passes over --train-data; 0 only evaluates")
    pretrained_checkpoint: str | None = option(
        None, "directory of checkpoints whose weights fine-tuning begins from; --load goes on with a fine-tuned one"
    )
    overlapping_eval: int = option(32, "of WIKITEXT103 and PERPLEXITY: tokens from one window's begin to the next one's")
    strict_lambada: bool = option(False, "of LAMBADA: the last word is tokenized on its own")
    results_path: str | None = option(None, "file that the results go to, as JSON; default results.json in --save")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Sections are the tables of a TOML file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    task: TaskConfig = field(default_factory=TaskConfig)


def sections() -> dict[str, type]:
    """Name and dataclass of every section of a run, in order."""
    return dict(get_type_hints(RunConfig))


def assemble(values: Mapping[str, Any]) -> RunConfig:
    """Return the schema's defaults with `section.field` values put in."""
    built = {}
    for section, config in sections().items():
        own = {name.split(".")[1]: v for name, v in values.items() if name.startswith(section + ".")}
        built[section] = config(**own)
    return RunConfig(**built)
