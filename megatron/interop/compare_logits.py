"""Compare the logits of our model and of transformers', with the same weights, on the same tokens.

Equal logits with a model's own weights do not prove that the mapping of tensors is right: initial biases are zeros and initial
norm weights ones, so a lost or swapped one makes no difference, and neither does a wrong epsilon. The models are therefore
compared again with the same random weights in both, none of them 0 or 1, and a third time with embeddings so small that the
epsilon of the first norm matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.weights import ModuleWeights
from megatron.config.schema import ModelConfig
from megatron.contract import Batch
from megatron.files.regular import read_json
from megatron.interop.families.family import HFFamily
from megatron.interop.families.table import family_named
from megatron.interop.tensor_mapping import TensorMapping
from megatron.model.bert import Bert
from megatron.model.build import build_stages
from megatron.model.gpt import GPT
from megatron.model.task_heads import FineTuned
from megatron.model.transformer import Transformer
from megatron.parallel.random import derive_seed
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.plan.stages import plan_model_stages

LOGIT_TOLERANCE = 1e-4  # absolute, for logits up to 10; above, relative to a tenth of the largest
# Relative to the largest logit. Rounding makes differences up to 3e-6; tanh GELU in place of the exact one makes 4e-5 and more.
RANDOM_TOLERANCE = 2e-5
MAX_PROMPT_TOKENS = 256

LogitPair = tuple[Tensor, Tensor]  # logits of our model and of transformers', both [..., vocab] or [..., classes]


class LogitsError(Exception):
    """The logits of the two models differ, or transformers cannot open or run its model."""


class NoTransformersError(LogitsError):
    """transformers is not installed."""


@dataclass(frozen=True)
class LogitAgreement:
    """Result of a comparison.

    Attributes:
        largest: the largest absolute difference of logits with the models' own weights.
        positions: the total number of tokens of the prompts.
    """

    largest: float
    positions: int


def import_transformers() -> Any:
    """Return the transformers package with its logging reduced to errors. NoTransformersError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise NoTransformersError("transformers is not installed") from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def known_to_transformers(architecture: str) -> bool:
    """Return whether the installed transformers has a class of this name; it has none for a family that a package adds."""
    return hasattr(import_transformers(), architecture)


def open_in_transformers(directory: Path, name: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """Open the model in a Hugging Face directory by transformers, in fp32 and evaluation mode.

    Args:
        directory: the Hugging Face directory.
        name: the name of a class in transformers.
        options: further keyword arguments of its `from_pretrained`.

    Returns:
        The model, and its loading info: `unexpected_keys` and the like.

    Raises:
        LogitsError: transformers cannot open it, or weights are missing or of another shape and would be initialized anew.
    """
    transformers = import_transformers()
    try:
        hf_model, info = getattr(transformers, name).from_pretrained(
            str(directory), local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises many types; the user needs to see each
        raise LogitsError(f"transformers cannot open it: {type(error).__name__}: {error}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise LogitsError(f"transformers finds {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:20]))}")
    hf_model.config.return_dict = True  # config.json may ask for tuples, which models of transformers 5 cannot process
    return hf_model.float().eval(), info


def compare_with_source(directory: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """Compare an imported model with the model that transformers opens from the same directory.

    Args:
        directory: the imported Hugging Face directory.
        config: the resolved configuration.
        weights: the whole tensors under our names, in the shapes of `config`.

    Returns:
        A line with the largest difference, or with the reason why nothing was compared: transformers is not installed, or has
        no class for the family.

    Raises:
        LogitsError: the logits differ, or transformers cannot open the directory.
    """
    try:
        import_transformers()
    except NoTransformersError as error:
        return f"not compared with transformers' logits: {error}"
    family = family_named(read_json(directory / "config.json")["model_type"])
    architecture = family.exported_class(config).architecture
    if not known_to_transformers(architecture):
        return f"not compared with transformers' logits: transformers has no {architecture}"
    name = "AutoModelForCausalLM" if config.architecture == "gpt" else architecture
    hf_model, _ = open_in_transformers(directory, name, dtype=torch.float32)
    agreement = compare_models(model_from_weights(config, weights), hf_model, family, [])
    return f"transformers' logits differ by at most {agreement.largest:.2e} (fp32, {agreement.positions} positions)"


def model_from_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> Transformer:
    """Return an unsharded fp32 model in evaluation mode with these weights, which have our names."""
    plan = plan_model_stages(config)
    model = build_stages(config, plan.placement, plan.parts, TensorParallel.alone(), 0)[0].eval()
    for shard in ModuleWeights(model).shards():
        shard.data.copy_(weights[shard.name])
    return model


def compare_models(model: Transformer, hf_model: Any, family: HFFamily, prompts: Sequence[Sequence[int]]) -> LogitAgreement:
    """Compare two models; this overwrites the weights of both with random ones.

    Args:
        model: our model, unsharded, fp32, in evaluation mode.
        hf_model: transformers' model, fp32, in evaluation mode.
        family: the family, whose table maps the weights.
        prompts: token ids of texts; `vocabulary_prompt` is added to them.

    Returns:
        The largest difference with the models' own weights.

    Raises:
        LogitsError: the logits differ by more than the tolerances allow.
    """
    sweep = vocabulary_prompt(model.config)
    prompts = [sweep, *(ids for ids in prompts if ids)]
    largest = 0.0
    for ours, theirs in logit_pairs(model, hf_model, prompts):
        difference, allowed = _max_difference(ours, theirs), LOGIT_TOLERANCE * max(1.0, float(theirs.abs().max()) / 10)
        if not difference <= allowed:  # also when it is NaN
            raise LogitsError(f"the logits differ by {difference:.2e}, more than {allowed:.1g}")
        largest = max(largest, difference)
    _randomize(model, hf_model, family)
    for small_embeddings in (False, True):
        if small_embeddings:
            _shrink_embeddings(model, hf_model, family)
        for ours, theirs in logit_pairs(model, hf_model, [sweep, sweep[: len(sweep) // 2 + 1]]):
            difference, scale = _max_difference(ours, theirs), float(theirs.abs().max())
            if not difference <= RANDOM_TOLERANCE * scale:
                weights = "random weights and small embeddings" if small_embeddings else "random weights"
                raise LogitsError(
                    f"with {weights} in both models the logits differ by {difference:.2e}, and the largest is {scale:.2e}"
                )
    return LogitAgreement(largest, sum(map(len, prompts)))


def vocabulary_prompt(config: ModelConfig) -> list[int]:
    """Return token ids spread over the whole vocabulary, as many as the model and MAX_PROMPT_TOKENS allow."""
    vocab = config.known_vocab_size
    length = min(MAX_PROMPT_TOKENS, config.max_position_embeddings)
    # The quadratic term makes the steps differ, so that few tokens have the same neighbours.
    return [(i * max(1, vocab // length) + i * i) % vocab for i in range(length - 1)] + [vocab - 1]


def _randomize(model: Transformer, hf_model: Any, family: HFFamily) -> None:
    """Put the same random weights into both models."""
    native = {shard.name: shard.data for shard in ModuleWeights(model).shards()}
    parameters = dict(hf_model.named_parameters())  # lists tied parameters once
    with torch.no_grad():
        for row in family.mappings(model.config):
            if row.native in native:
                native[row.native].copy_(_random_like(row.native, native[row.native]))
                value = native[row.native]
            elif row.zeros_shape is not None:
                value = torch.zeros(row.zeros_shape(model.config))
            else:
                continue  # the output layer of a tied model
            _assign(parameters, row, value, model.config)
    if parameters:
        raise LogitsError(
            f"transformers' model has weights that none of our tensors maps to: {', '.join(sorted(parameters)[:20])}"
        )


def _assign(parameters: dict[str, Any], row: TensorMapping, value: Tensor, config: ModelConfig) -> None:
    """Copy a tensor of ours into the parameters of transformers that it maps to, and remove these from `parameters`."""
    for name, tensor in zip(row.hf, row.conversion.to_hf(value, config), strict=True):
        parameter = parameters.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            raise LogitsError(f"transformers' model has no {name} of shape {tuple(tensor.shape)}")
        parameter.copy_(tensor)


def _random_like(name: str, like: Tensor) -> Tensor:
    """Return random values for the tensor `name`: biases with mean 0.1, norm weights with mean 1, the others with mean 0."""
    noise: Tensor = torch.randn(like.shape, generator=torch.Generator().manual_seed(derive_seed(5, name)))
    if name.startswith("embedding."):
        return noise
    if like.dim() == 2:
        return noise / sqrt(like.shape[1])  # [out, in]: outputs have the variance of the inputs
    return 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.1)


def _shrink_embeddings(model: Transformer, hf_model: Any, family: HFFamily) -> None:
    """Scale the embeddings of both models, so that their variance is about the epsilon of the norms."""
    scale = model.config.layernorm_epsilon**0.5  # the random embeddings have variance 1
    native = {shard.name: shard.data for shard in ModuleWeights(model).shards()}
    parameters = dict(hf_model.named_parameters())
    with torch.no_grad():
        for row in family.mappings(model.config):
            if row.native.startswith("embedding.") and row.native in native:
                native[row.native].mul_(scale)
                _assign(parameters, row, native[row.native], model.config)


def logit_pairs(model: Transformer, hf_model: Any, prompts: Sequence[Sequence[int]]) -> Iterator[LogitPair]:
    """Yield the logits of both models: of a GPT for each prompt, of a BERT and its binary head for all in one padded batch.

    Args:
        model: our model.
        hf_model: transformers' model.
        prompts: the token ids of each prompt.
    """
    if isinstance(model, FineTuned):
        for ids in prompts:
            yield from _task_logit_pairs(model, hf_model, ids)
    elif isinstance(model, Bert):
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts])
        yield from bert_logits(model, hf_model, tokens, torch.tensor([len(ids) for ids in prompts]))
    elif isinstance(model, GPT):
        yield from (gpt_logits(model, hf_model, torch.tensor([ids])) for ids in prompts)


def _task_logit_pairs(model: FineTuned, hf_model: Any, prompt: Sequence[int]) -> Iterator[LogitPair]:
    """Yield the logits of a task's head on one row for each choice; for other heads than "choice" on two rows.

    prompt: token ids; the second half of each row is the second segment.
    """
    rows = max(2, len(model.config.labels)) if model.config.task_head == "choice" else 2
    # Row i lacks the prompt's first i tokens, and i tokens of padding follow.
    removed = torch.arange(rows).clamp(max=len(prompt) - 1)
    tokens = torch.tensor([[*prompt[n:], *[0] * n] for n in removed.tolist()])
    padding = torch.arange(len(prompt)) >= len(prompt) - removed[:, None]  # [rows, seq]
    batch, segments = _bert_batch(model, tokens, padding)
    inputs = {"input_ids": tokens, "attention_mask": (~padding).long(), "token_type_ids": segments}
    if model.config.task_head == "choice":
        inputs = {name: None if values is None else values[None] for name, values in inputs.items()}  # [1, choices, seq]
    with torch.no_grad():
        outputs, logits = _run_transformers(hf_model, **inputs), model.task_logits(model.hidden(None, batch), batch)
        if model.config.task_head == "span":
            for ours, theirs in zip(logits, (outputs.start_logits, outputs.end_logits), strict=True):  # [rows, seq] each
                yield ours[~padding], theirs[~padding]
        else:
            compared = ~padding if logits.dim() == 3 else slice(None)  # tags have logits at each token, [rows, seq, classes]
            yield logits[compared], outputs.logits[compared]


def _bert_batch(model: Transformer, tokens: Tensor, padding: Tensor) -> tuple[Batch, Tensor | None]:
    """Return a batch in which the second half of each row is the second segment; and the segments, None without token types."""
    positions, lengths = torch.arange(tokens.shape[1]).expand_as(tokens), (~padding).sum(dim=1, keepdim=True)
    segments = ((2 * positions >= lengths) & ~padding).long() if model.config.num_token_types else None
    documents = padding.long() if padding.any() else None  # padding is a separate document, which no other token attends to
    sample_ids = torch.zeros(len(tokens), dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones(tokens.shape), positions, sample_ids, documents, segments=segments), segments


def bert_logits(model: Bert, hf_model: Any, tokens: Tensor, lengths: Tensor) -> Iterator[LogitPair]:
    """Yield both models' logits of the vocabulary at each token, then those of the binary head if there is one.

    The second half of each row is the second segment.

    Args:
        model: our model.
        hf_model: transformers' model.
        tokens: `[batch, seq]`, token ids.
        lengths: `[batch]`, the number of tokens of each row before its padding.
    """
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]  # [batch, seq]
    batch, segments = _bert_batch(model, tokens, padding)
    with torch.no_grad():
        final = model.hidden(None, batch)  # [seq, batch, hidden]
        outputs = _run_transformers(hf_model, input_ids=tokens, attention_mask=(~padding).long(), token_type_ids=segments)
        word_logits = outputs.prediction_logits if model.order is not None else outputs.logits
        yield model.logits(final).transpose(0, 1)[~padding], word_logits[~padding]
        if model.order is not None:
            yield model.order_logits(final), outputs.seq_relationship_logits


def gpt_logits(model: GPT, hf_model: Any, tokens: Tensor) -> LogitPair:
    """Return the logits of both models, each `[batch, seq, vocab]`.

    Args:
        model: our model.
        hf_model: transformers' model.
        tokens: `[batch, seq]`, token ids.
    """
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, tokens, torch.ones(tokens.shape), positions, torch.zeros(len(tokens), dtype=torch.int64))
    with torch.no_grad():
        return model.logits(model.hidden(None, batch)).transpose(0, 1), _run_transformers(hf_model, input_ids=tokens).logits


def _run_transformers(hf_model: Any, **inputs: Tensor | None) -> Any:
    """Call a model of transformers. LogitsError when it cannot run."""
    try:
        return hf_model(**inputs)
    except Exception as error:  # transformers raises many types; the user needs to see each
        raise LogitsError(f"transformers cannot run it: {type(error).__name__}: {error}") from error


def hidden_state_difference(model: Transformer, other: Transformer) -> float:
    """Return the largest absolute difference of the last hidden states of two of our models, on `vocabulary_prompt`."""
    tokens = torch.tensor([vocabulary_prompt(model.config)])
    batch, _ = _bert_batch(model, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        return _max_difference(model.hidden(None, batch), other.hidden(None, batch))


def _max_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference, NaN if any value is NaN. LogitsError for different shapes."""
    if ours.shape != theirs.shape:
        raise LogitsError(f"the logits have shape {tuple(ours.shape)} here, {tuple(theirs.shape)} in transformers")
    return float((ours - theirs).abs().max())
