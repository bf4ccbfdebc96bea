"""Settings of the model: its architecture. Together with the weights this is all that inference and export need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from megatron.config.check import ConfigCheck, Rules, divisors, missing
from megatron.config.errors import Problem
from megatron.config.normalizations import NORMALIZATIONS, OWN, norm_class
from megatron.config.option import ABOVE_0_TO_1, FROM_0_BELOW_1, LAYERS, NOT_NEGATIVE, POSITIVE, option

FOREIGN: Mapping[str, tuple[str, ...]] = MappingProxyType(
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
    """The architecture. Together with the weights this is all that inference and export need."""

    num_layers: int | None = option(None, "transformer layers", aliases=("--encoder-num-layers",), legal=LAYERS)
    hidden_size: int | None = option(None, "width of the residual stream", legal=POSITIVE)
    ffn_hidden_size: int | None = option(
        None, "width of the MLP; default 4 x hidden, with --swiglu 2/3 of that in steps of 64", legal=POSITIVE
    )
    num_attention_heads: int | None = option(None, "query heads", legal=POSITIVE)
    num_query_groups: int | None = option(
        None,
        "key-value heads (grouped-query attention); default one per query head",
        values={"--group-query-attention": 1},
        yielding=("--group-query-attention",),
        legal=POSITIVE,
    )
    kv_channels: int | None = option(None, "width of one head; default hidden / heads", legal=POSITIVE)
    max_position_embeddings: int | None = option(None, "longest sequence the model can see", legal=POSITIVE)
    position_embedding_type: str = option(
        "learned_absolute",
        "how positions enter: a learned table, rotary (RoPE, arXiv 2104.09864), or not at all",
        choices=("learned_absolute", "rope", "none"),
        values={"--use-rotary-position-embeddings": "rope", "--no-position-embedding": "none"},
        yielding=("--no-position-embedding",),
    )
    rotary_percent: float = option(1.0, "share of each head that RoPE turns", legal=ABOVE_0_TO_1)
    rotary_interleaved: bool = option(False, "RoPE turns neighbouring channels as a pair, not the halves of a head")
    rotary_base: float = option(10000.0, "base of the RoPE frequencies", aliases=("--rope-theta",), legal=POSITIVE)
    normalization: str = option("LayerNorm", "normalisation layer", choices=tuple(NORMALIZATIONS))
    layernorm_epsilon: float = option(1e-5, "added to the variance", aliases=("--norm-epsilon",), legal=POSITIVE)
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
    attention_dropout: float = option(0.1, "dropout probability of the attention weights", legal=FROM_0_BELOW_1)
    hidden_dropout: float = option(0.1, "dropout probability of embedding, attention and MLP output", legal=FROM_0_BELOW_1)
    fused_attention_dropout: bool = option(
        False,
        "let the fused attention kernel draw the attention dropout: faster, but the mask then depends on the layout",
    )
    init_method_std: float = option(0.02, "standard deviation of the initial weights", legal=NOT_NEGATIVE)
    init_method_xavier_uniform: bool = option(False, "initial weights from Xavier's uniform distribution")
    make_vocab_size_divisible_by: int = option(
        128, "each tensor-parallel rank's share of the vocabulary is padded to a multiple of this", legal=POSITIVE
    )
    vocab_size: int | None = option(None, "true size of the vocabulary, from the tokenizer", flag=None)
    task_head: str | None = option(
        None,
        "the head of a task, in place of those of pretraining",
        flag=None,
        choices=("classification", "choice", "span", "tags"),
    )
    labels: tuple[str, ...] = option((), "names of the classes or choices that a task's head tells apart", flag=None)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSettings):
    """The architecture of a model that can be built. Only its vocabulary may be unknown yet: the tokenizer says it."""

    num_layers: int = field()
    hidden_size: int = field()
    ffn_hidden_size: int = field()
    num_attention_heads: int = field()
    num_query_groups: int = field()
    kv_channels: int = field()
    max_position_embeddings: int = field()

    @property
    def known_vocab_size(self) -> int:
        """True size of the vocabulary. ValueError where no tokenizer and no checkpoint has said it yet."""
        if self.vocab_size is None:
            raise ValueError("ModelConfig.vocab_size is not resolved: it comes with a tokenizer or a checkpoint")
        return self.vocab_size

    @property
    def num_token_types(self) -> int:
        """Rows of the token type table; 0 where there is none."""
        return 2 if self.architecture == "bert" and self.bert_binary_head else 0

    @property
    def has_output_layer(self) -> bool:
        """True where there is an output layer over the vocabulary."""
        return self.task_head is None

    @property
    def ties_embeddings(self) -> bool:
        """True where the output layer is the embedding's matrix."""
        return self.has_output_layer and not self.untie_embeddings_and_output_weights

    @property
    def has_binary_head(self) -> bool:
        """True where there is BERT's head that tells if two segments were swapped."""
        return self.num_token_types > 0 and self.has_output_layer

    @property
    def has_pooler(self) -> bool:
        """True where there is a pooler: a dense layer and tanh on the first token."""
        return self.has_binary_head or self.task_head in ("classification", "choice")

    @property
    def rows_per_sample(self) -> int:
        """Rows of one sample: a choice has one for each of its answers."""
        return len(self.labels) if self.task_head == "choice" else 1

    @property
    def num_task_outputs(self) -> int:
        """Numbers that a task's head gives: for a choice one of each row, for a span its start and its end."""
        return {"choice": 1, "span": 2}.get(self.task_head or "", len(self.labels))


def derive_model(model: ModelSettings, seq_length: int | None) -> ModelSettings:
    """Fill in the widths and numbers of heads that follow from others. The values are Megatron-LM's."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    ffn, kv, positions = model.ffn_hidden_size, model.kv_channels, model.max_position_embeddings
    if ffn is None and hidden is not None:
        # SwiGLU has three matrices where the others have two: two thirds of the width keep the number of parameters.
        ffn = max(64, int((4 * hidden * 2 / 3) / 64) * 64) if model.activation == "swiglu" else 4 * hidden
    if kv is None and hidden is not None and heads and hidden % heads == 0:
        kv = hidden // heads
    if positions is None and model.position_embedding_type != "learned_absolute":
        positions = seq_length
    groups = heads if model.num_query_groups is None else model.num_query_groups
    return replace(model, ffn_hidden_size=ffn, kv_channels=kv, num_query_groups=groups, max_position_embeddings=positions)


def sizes_given(c: ConfigCheck) -> Iterator[Problem]:
    """A run needs its sizes."""
    names = ["model.num_layers", "model.hidden_size", "model.num_attention_heads"]
    if c["model.position_embedding_type"] == "learned_absolute":
        names.append("model.max_position_embeddings")
    yield from missing(c, names)


def head_width(c: ConfigCheck) -> Iterator[Problem]:
    """Heads share the hidden size evenly, unless --kv-channels says otherwise."""
    hidden, heads = c["model.hidden_size"], c["model.num_attention_heads"]
    if c["model.kv_channels"] is None and hidden and heads and hidden % heads and "model.kv_channels" not in c.invalid:
        yield Problem(
            c.flag_text("model.hidden_size"), f"is not divisible by `--num-attention-heads {heads}`", divisors(hidden, 32)
        )


def query_groups(c: ConfigCheck) -> Iterator[Problem]:
    """Each group of queries has the same number of heads."""
    heads, groups = c["model.num_attention_heads"], c["model.num_query_groups"]
    if heads and groups and heads % groups:
        rule = f"is not divisible by `--num-query-groups {groups}`"
        yield Problem(c.flag_text("model.num_attention_heads"), rule, divisors(heads))


def rotary_width(c: ConfigCheck) -> Iterator[Problem]:
    """RoPE turns pairs of numbers."""
    kv, percent = c["model.kv_channels"], c["model.rotary_percent"]
    if c["model.position_embedding_type"] == "rope" and kv and (int(kv * percent) < 2 or int(kv * percent) % 2):
        rule = f"turns {int(kv * percent)} of the {kv} channels of a head, which must be an even number of at least 2"
        yield Problem(c.flag_text("model.rotary_percent"), rule)


def positions(c: ConfigCheck) -> Iterator[Problem]:
    """The model must see a whole sample."""
    most, length = c["model.max_position_embeddings"], c["data.seq_length"]
    if most and length and most < length:
        yield Problem(
            c.flag_text("model.max_position_embeddings"), f"is less than `--seq-length {length}`", f"{length} or more"
        )


def normalization_package(c: ConfigCheck) -> Iterator[Problem]:
    """A normalisation of another package can be loaded; our own, which need torch, are not loaded to see that."""
    name = c["model.normalization"]
    if name in OWN or "model.normalization" in c.invalid:
        return
    try:
        norm_class(name)
    except ValueError as error:
        yield Problem(c.flag_text("model.normalization"), str(error))


def other_architecture_settings(c: ConfigCheck) -> Iterator[Problem]:
    """A setting that the model does not have would silently do nothing."""
    own = c["model.architecture"]
    for name in FOREIGN[own]:
        if c.is_set(name):
            other = {"gpt": "BERT (pretrain_bert.py)", "bert": "GPT (pretrain_gpt.py)"}[own]
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
