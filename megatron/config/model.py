"""Settings of the model's architecture, which together with the weights are all that inference and export need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from megatron.config.check import ConfigCheck, Rules, divisors, missing
from megatron.config.errors import Problem
from megatron.config.normalizations import BUILT_IN, NORMALIZATIONS, norm_class
from megatron.config.option import ABOVE_0_TO_1, FROM_0_BELOW_1, LAYERS, NOT_NEGATIVE, POSITIVE, option

# Settings that have no effect on an architecture, so that giving them with it is a mistake.
UNSUPPORTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gpt": ("model.bert_binary_head", "data.mask_prob", "data.short_seq_prob"),
        "bert": (
            "model.untie_embeddings_and_output_weights",
            "data.reset_position_ids",
            "data.reset_attention_mask",
            "data.eod_mask_loss",
        ),
    }
)


@dataclass(frozen=True)
class ModelSettings:
    """Model architecture. Together with the weights, it is all that inference and export need."""

    num_layers: int | None = option(None, "number of transformer layers", aliases=("--encoder-num-layers",), legal=LAYERS)
    hidden_size: int | None = option(None, "transformer hidden size, the width of the residual stream", legal=POSITIVE)
    ffn_hidden_size: int | None = option(
        None, "hidden size of the MLP (default: 4 x hidden-size; with --swiglu 8/3 x, down to a multiple of 64)", legal=POSITIVE
    )
    num_attention_heads: int | None = option(None, "number of attention heads", legal=POSITIVE)
    num_query_groups: int | None = option(
        None,
        "number of key-value heads, for grouped-query attention (default: num-attention-heads)",
        shortcuts={"--group-query-attention": 1},
        fallbacks=("--group-query-attention",),
        legal=POSITIVE,
    )
    kv_channels: int | None = option(
        None, "size of each attention head (default: hidden-size / num-attention-heads)", legal=POSITIVE
    )
    max_position_embeddings: int | None = option(None, "maximum sequence length of the model, in tokens", legal=POSITIVE)
    position_embedding_type: str = option(
        "learned_absolute",
        "position embedding: a learned table, rotary (RoPE, arXiv 2104.09864), or none",
        choices=("learned_absolute", "rope", "none"),
        shortcuts={"--use-rotary-position-embeddings": "rope", "--no-position-embedding": "none"},
        fallbacks=("--no-position-embedding",),
    )
    rotary_percent: float = option(1.0, "fraction of each head's channels that RoPE rotates", legal=ABOVE_0_TO_1)
    rotary_interleaved: bool = option(False, "RoPE rotates pairs of adjacent channels, instead of pairs half a head apart")
    rotary_base: float = option(10000.0, "base of the RoPE frequencies", aliases=("--rope-theta",), legal=POSITIVE)
    normalization: str = option("LayerNorm", "type of normalisation layer", choices=tuple(NORMALIZATIONS))
    layernorm_epsilon: float = option(
        1e-5, "epsilon of the normalisation layers, added to the variance", aliases=("--norm-epsilon",), legal=POSITIVE
    )
    apply_layernorm_1p: bool = option(
        False, "store the weights of norms as gamma - 1, so that weight decay pulls gamma towards 1"
    )
    add_norm_bias: bool = option(True, "biases of LayerNorm", off_flag="--disable-norm-bias")
    add_bias_linear: bool = option(True, "biases of linear layers", off_flag="--disable-bias-linear")
    activation: str = option(
        "gelu",
        "activation function of the MLP; gelu is the tanh approximation of GPT-2 and Megatron's fused kernel, gelu-exact uses "
        "erf",
        choices=("gelu", "gelu-exact", "squared-relu", "swiglu"),
        shortcuts={"--openai-gelu": "gelu", "--squared-relu": "squared-relu", "--swiglu": "swiglu"},
    )
    architecture: str = option("gpt", "gpt or bert, set by the program", flag=None, choices=("gpt", "bert"))
    bert_binary_head: bool = option(
        True,
        "token types, pooler and swapped-segments head of BERT",
        off_flag="--bert-no-binary-head",
    )
    untie_embeddings_and_output_weights: bool = option(
        False, "give the output layer a weight matrix of its own, not the word embedding's"
    )
    apply_residual_connection_post_layernorm: bool = option(False, "take the residual connection from the output of the norm")
    attention_dropout: float = option(0.1, "dropout probability of the attention weights", legal=FROM_0_BELOW_1)
    hidden_dropout: float = option(
        0.1, "dropout probability of the outputs of embedding, attention and MLP", legal=FROM_0_BELOW_1
    )
    fused_attention_dropout: bool = option(
        False,
        "let the fused attention kernel draw the dropout mask; faster, but the mask then depends on the layout",
    )
    init_method_std: float = option(
        0.02, "standard deviation of the normal distribution of initial weights", legal=NOT_NEGATIVE
    )
    init_method_xavier_uniform: bool = option(False, "draw initial weights from Xavier's uniform distribution")
    make_vocab_size_divisible_by: int = option(
        128, "pad each tensor-parallel rank's share of the vocabulary to a multiple of this", legal=POSITIVE
    )
    vocab_size: int | None = option(None, "unpadded size of the vocabulary, from the tokenizer", flag=None)
    task_head: str | None = option(
        None,
        "kind of task head, in place of the heads of pretraining",
        flag=None,
        choices=("classification", "choice", "span", "tags"),
    )
    labels: tuple[str, ...] = option(
        (), "names of the classes or choices of a task head, in the order of its outputs", flag=None
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSettings):
    """Resolved architecture of a model, from which it can be built; only `vocab_size` may still have to be filled in."""

    num_layers: int = field()
    hidden_size: int = field()
    ffn_hidden_size: int = field()
    num_attention_heads: int = field()
    num_query_groups: int = field()
    kv_channels: int = field()
    max_position_embeddings: int = field()

    @property
    def known_vocab_size(self) -> int:
        """Unpadded size of the vocabulary. ValueError if no tokenizer and no checkpoint has given it yet."""
        if self.vocab_size is None:
            raise ValueError("ModelConfig.vocab_size is not resolved: it comes with a tokenizer or a checkpoint")
        return self.vocab_size

    @property
    def num_token_types(self) -> int:
        """Number of rows of the token type embedding; 0 if the model has none."""
        return 2 if self.architecture == "bert" and self.bert_binary_head else 0

    @property
    def has_output_layer(self) -> bool:
        """True when the model has an output layer over the vocabulary."""
        return self.task_head is None

    @property
    def ties_embeddings(self) -> bool:
        """True when the output layer uses the matrix of the word embedding."""
        return self.has_output_layer and not self.untie_embeddings_and_output_weights

    @property
    def has_binary_head(self) -> bool:
        """True when the model has BERT's head that predicts whether two segments were swapped."""
        return self.num_token_types > 0 and self.has_output_layer

    @property
    def has_pooler(self) -> bool:
        """True when the model has a pooler: a dense layer and tanh on the first token."""
        return self.has_binary_head or self.task_head in ("classification", "choice")

    @property
    def rows_per_sample(self) -> int:
        """Number of sequences in a sample: one for each answer if the task head is a choice, else 1."""
        return len(self.labels) if self.task_head == "choice" else 1

    @property
    def num_task_outputs(self) -> int:
        """Number of outputs of the task head: 1 for a choice, 2 (start and end) for a span, else one per label."""
        return {"choice": 1, "span": 2}.get(self.task_head or "", len(self.labels))


def derive_model(model: ModelSettings, seq_length: int | None) -> ModelSettings:
    """Fill in the sizes that follow from others, with the formulas of Megatron-LM (`validate_args` in its arguments.py)."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    ffn, kv, positions = model.ffn_hidden_size, model.kv_channels, model.max_position_embeddings
    if ffn is None and hidden is not None:
        # SwiGLU has three matrices instead of two, so 2/3 of the width gives the same number of parameters (arXiv 2002.05202).
        ffn = max(64, int((4 * hidden * 2 / 3) / 64) * 64) if model.activation == "swiglu" else 4 * hidden
    if kv is None and hidden is not None and heads and hidden % heads == 0:
        kv = hidden // heads
    # Without a learned position table, the model itself has no maximum length, so the length of its training is recorded.
    if positions is None and model.position_embedding_type != "learned_absolute":
        positions = seq_length
    groups = heads if model.num_query_groups is None else model.num_query_groups
    return replace(model, ffn_hidden_size=ffn, kv_channels=kv, num_query_groups=groups, max_position_embeddings=positions)


def sizes_given(c: ConfigCheck) -> Iterator[Problem]:
    """The sizes of the model are given."""
    names = ["model.num_layers", "model.hidden_size", "model.num_attention_heads"]
    if c["model.position_embedding_type"] == "learned_absolute":
        names.append("model.max_position_embeddings")
    yield from missing(c, names)


def head_width(c: ConfigCheck) -> Iterator[Problem]:
    """The hidden size is divisible by the number of heads, unless --kv-channels gives the size of a head."""
    hidden, heads = c["model.hidden_size"], c["model.num_attention_heads"]
    if c["model.kv_channels"] is None and hidden and heads and hidden % heads and "model.kv_channels" not in c.invalid:
        yield Problem(
            c.flag_text("model.hidden_size"), f"is not divisible by `--num-attention-heads {heads}`", divisors(hidden, 32)
        )


def query_groups(c: ConfigCheck) -> Iterator[Problem]:
    """The number of attention heads is divisible by the number of query groups."""
    heads, groups = c["model.num_attention_heads"], c["model.num_query_groups"]
    if heads and groups and heads % groups:
        rule = f"is not divisible by `--num-query-groups {groups}`"
        yield Problem(c.flag_text("model.num_attention_heads"), rule, divisors(heads))


def rotary_width(c: ConfigCheck) -> Iterator[Problem]:
    """RoPE rotates an even number of channels, at least 2."""
    kv, percent = c["model.kv_channels"], c["model.rotary_percent"]
    if c["model.position_embedding_type"] == "rope" and kv and (int(kv * percent) < 2 or int(kv * percent) % 2):
        rule = f"rotates {int(kv * percent)} of the {kv} channels of a head, which must be an even number of at least 2"
        yield Problem(c.flag_text("model.rotary_percent"), rule)


def positions(c: ConfigCheck) -> Iterator[Problem]:
    """The sequence length is not greater than the model's maximum."""
    maximum, length = c["model.max_position_embeddings"], c["data.seq_length"]
    if maximum and length and maximum < length:
        yield Problem(
            c.flag_text("model.max_position_embeddings"), f"is less than `--seq-length {length}`", f"{length} or more"
        )


def normalization_package(c: ConfigCheck) -> Iterator[Problem]:
    """A normalisation of another package can be imported."""
    name = c["model.normalization"]
    # The built-in ones are not loaded here, because that would import torch before the command has been checked.
    if name in BUILT_IN or "model.normalization" in c.invalid:
        return
    try:
        norm_class(name)
    except ValueError as error:
        yield Problem(c.flag_text("model.normalization"), str(error))


def other_architecture_settings(c: ConfigCheck) -> Iterator[Problem]:
    """No setting of another architecture is given."""
    architecture = c["model.architecture"]
    for name in UNSUPPORTED[architecture]:
        if c.is_set(name):
            other = {"gpt": "BERT (pretrain_bert.py)", "bert": "GPT (pretrain_gpt.py)"}[architecture]
            yield Problem(c.flag_text(name), f"belongs to {other}; leave it out")


RULES = Rules(
    every_run=(
        sizes_given,
        head_width,
        query_groups,
        rotary_width,
        positions,
        normalization_package,
        other_architecture_settings,
    )
)
