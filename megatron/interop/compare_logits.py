"""Compare the logits of our model and of transformers', with the same weights, on the same tokens.

A model's own weights hide much: fresh biases are zeros and fresh norms ones, so one that is lost or exchanged does not show,
nor does a wrong epsilon. So both models are compared a second time with random weights, of which none has a neutral value, put
into either by the table of names; and a third time with embeddings so faint that the epsilon of the first norm counts.
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
RANDOM_TOLERANCE = 2e-5  # of the largest logit; rounding makes up to 3e-6, the tanh approximation of GELU 4e-5 and more
MAX_PROMPT_TOKENS = 256

LogitPair = tuple[Tensor, Tensor]  # the same logits, of our model and of transformers', both [..., vocab] or [..., classes]


class LogitsError(Exception):
    """The two models are not the same, or transformers cannot open its own."""


class NoTransformersError(LogitsError):
    """transformers is not installed."""


@dataclass(frozen=True)
class LogitAgreement:
    """Result of a comparison.

    Attributes:
        largest: the largest difference of logits with the models' own weights.
        positions: the number of tokens that were compared.
    """

    largest: float
    positions: int


def import_transformers() -> Any:
    """Return the package, told to be silent. NoTransformersError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise NoTransformersError("transformers is not installed") from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def known_to_transformers(architecture: str) -> bool:
    """Return whether the installed transformers has a class of this name; it has none of a family that only a package knows."""
    return hasattr(import_transformers(), architecture)


def open_in_transformers(directory: Path, name: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """Open the model in a Hugging Face directory by transformers, in fp32 and evaluation mode.

    Args:
        directory: the Hugging Face directory.
        name: of the class in transformers.
        options: of its `from_pretrained`.

    Returns:
        The model, and what transformers says of its tensors: `unexpected_keys` and the like.

    Raises:
        LogitsError: when it does not open, or not without inventing weights.
    """
    transformers = import_transformers()
    try:
        hf_model, info = getattr(transformers, name).from_pretrained(
            str(directory), local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise LogitsError(f"transformers cannot open it: {type(error).__name__}: {error}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise LogitsError(f"transformers finds {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:20]))}")
    hf_model.config.return_dict = True  # a file can ask for tuples, which the models of transformers 5 themselves cannot read
    return hf_model.float().eval(), info


def compare_with_source(directory: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """Compare what was read of a Hugging Face directory with the model that transformers opens there.

    Args:
        directory: the source.
        config: resolved.
        weights: under our names; whole, and of the shapes that `config` wants.

    Returns:
        A line that says how far apart the two are, or that transformers is not installed, or does not know the family.

    Raises:
        LogitsError: when they differ, or transformers cannot open the directory.
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
    """Return a whole model in evaluation mode, fp32, with these weights, by our names."""
    plan = plan_model_stages(config)
    model = build_stages(config, plan.placement, plan.parts, TensorParallel.alone(), 0)[0].eval()
    for shard in ModuleWeights(model).shards():
        shard.data.copy_(weights[shard.name])
    return model


def compare_models(model: Transformer, hf_model: Any, family: HFFamily, prompts: Sequence[Sequence[int]]) -> LogitAgreement:
    """Compare two models, whose weights are random afterwards.

    Args:
        model: whole, fp32, in evaluation mode.
        hf_model: of transformers, likewise.
        family: whose table says which weights are the same.
        prompts: token ids of texts, to which one that goes through the vocabulary is added.

    Returns:
        The largest difference with the models' own weights.

    Raises:
        LogitsError: when they differ by more than rounding does.
    """
    sweep = vocabulary_prompt(model.config)
    prompts = [sweep, *(ids for ids in prompts if ids)]
    largest = 0.0
    for here, there in logit_pairs(model, hf_model, prompts):
        difference, allowed = _max_difference(here, there), LOGIT_TOLERANCE * max(1.0, float(there.abs().max()) / 10)
        if not difference <= allowed:  # also when it is NaN
            raise LogitsError(f"the logits differ by {difference:.2e}, more than {allowed:.1g}")
        largest = max(largest, difference)
    _randomize(model, hf_model, family)
    for faint in (False, True):
        if faint:
            _shrink_embeddings(model, hf_model, family)
        for here, there in logit_pairs(model, hf_model, [sweep, sweep[: len(sweep) // 2 + 1]]):
            difference, scale = _max_difference(here, there), float(there.abs().max())
            if not difference <= RANDOM_TOLERANCE * scale:
                kind = "random weights and faint embeddings" if faint else "random weights"
                raise LogitsError(f"with {kind} in both models the logits differ by {difference:.2e}, of {scale:.2e}")
    return LogitAgreement(largest, sum(map(len, prompts)))


def vocabulary_prompt(config: ModelConfig) -> list[int]:
    """Return a prompt that goes through the vocabulary from end to end, as long as the model and MAX_PROMPT_TOKENS allow."""
    vocab = config.known_vocab_size
    length = min(MAX_PROMPT_TOKENS, config.max_position_embeddings)
    # The square makes the steps differ, so that few tokens have the same neighbours.
    return [(i * max(1, vocab // length) + i * i) % vocab for i in range(length - 1)] + [vocab - 1]


def _randomize(model: Transformer, hf_model: Any, family: HFFamily) -> None:
    """Put the same random weights into both models: matrices that keep the size of their inputs, norms and biases about it."""
    native = {shard.name: shard.data for shard in ModuleWeights(model).shards()}
    parameters = dict(hf_model.named_parameters())  # tied ones once
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
        raise LogitsError(f"transformers' model has weights that no tensor here becomes: {', '.join(sorted(parameters)[:20])}")


def _assign(parameters: dict[str, Any], row: TensorMapping, value: Tensor, config: ModelConfig) -> None:
    """Copy a tensor of ours into transformers' parameters, which are taken out of `parameters`."""
    for name, tensor in zip(row.hf, row.conversion.to_hf(value, config), strict=True):
        parameter = parameters.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            raise LogitsError(f"transformers' model has no {name} of shape {tuple(tensor.shape)}")
        parameter.copy_(tensor)


def _random_like(name: str, like: Tensor) -> Tensor:
    """Return random values for the tensor of this name: no bias is 0, no weight of a norm is 1."""
    noise: Tensor = torch.randn(like.shape, generator=torch.Generator().manual_seed(derive_seed(5, name)))
    if name.startswith("embedding."):
        return noise
    if like.dim() == 2:
        return noise / sqrt(like.shape[1])  # of [out, in]: outputs are as large as inputs
    return 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.1)


def _shrink_embeddings(model: Transformer, hf_model: Any, family: HFFamily) -> None:
    """Scale the embeddings of both models, so that their variance is about the epsilon of the norms."""
    scale = model.config.layernorm_epsilon**0.5  # times embeddings of variance 1
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
        model: ours.
        hf_model: of transformers.
        prompts: token ids.
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
    """Yield the logits of a task's head on one row for each choice, padded but for the first.

    prompt: token ids; the second half of each row is the second segment.
    """
    rows = max(2, len(model.config.labels)) if model.config.task_head == "choice" else 2
    # Row i lacks its first i tokens and ends in as many of padding.
    short = torch.arange(rows).clamp(max=len(prompt) - 1)
    tokens = torch.tensor([[*prompt[less:], *[0] * less] for less in short.tolist()])
    padding = torch.arange(len(prompt)) >= len(prompt) - short[:, None]  # [rows, seq]
    batch, segments = _bert_batch(model, tokens, padding)
    inputs = {"input_ids": tokens, "attention_mask": (~padding).long(), "token_type_ids": segments}
    if model.config.task_head == "choice":
        inputs = {name: None if values is None else values[None] for name, values in inputs.items()}  # [1, choices, seq]
    with torch.no_grad():
        outputs, logits = _run_transformers(hf_model, **inputs), model.task_logits(model.hidden(None, batch), batch)
        if model.config.task_head == "span":
            for here, there in zip(logits, (outputs.start_logits, outputs.end_logits), strict=True):  # [rows, seq] each
                yield here[~padding], there[~padding]
        else:
            seen = ~padding if logits.dim() == 3 else slice(None)  # tags have logits at each token, [rows, seq, classes]
            yield logits[seen], outputs.logits[seen]


def _bert_batch(model: Transformer, tokens: Tensor, padding: Tensor) -> tuple[Batch, Tensor | None]:
    """Return a batch whose rows have their second half as second segment; and the segments, None without token types."""
    positions, lengths = torch.arange(tokens.shape[1]).expand_as(tokens), (~padding).sum(dim=1, keepdim=True)
    segments = ((2 * positions >= lengths) & ~padding).long() if model.config.num_token_types else None
    documents = padding.long() if padding.any() else None  # padding is a document of its own, which no token attends to
    sample_ids = torch.zeros(len(tokens), dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones(tokens.shape), positions, sample_ids, documents, segments=segments), segments


def bert_logits(model: Bert, hf_model: Any, tokens: Tensor, lengths: Tensor) -> Iterator[LogitPair]:
    """Yield the logits of the masked words of both models, then those of the binary head where there is one.

    The second half of each row is the second segment.

    Args:
        model: ours.
        hf_model: of transformers.
        tokens: `[batch, seq]`.
        lengths: `[batch]`, tokens of each row before its padding.
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
        model: ours.
        hf_model: of transformers.
        tokens: `[batch, seq]`.
    """
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, tokens, torch.ones(tokens.shape), positions, torch.zeros(len(tokens), dtype=torch.int64))
    with torch.no_grad():
        return model.logits(model.hidden(None, batch)).transpose(0, 1), _run_transformers(hf_model, input_ids=tokens).logits


def _run_transformers(hf_model: Any, **inputs: Tensor | None) -> Any:
    """Call a model of transformers. LogitsError when it cannot run."""
    try:
        return hf_model(**inputs)
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise LogitsError(f"transformers cannot run it: {type(error).__name__}: {error}") from error


def hidden_state_difference(model: Transformer, again: Transformer) -> float:
    """Return the largest difference of two of our models' last hidden states, on a prompt that goes through the vocabulary."""
    tokens = torch.tensor([vocabulary_prompt(model.config)])
    batch, _ = _bert_batch(model, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        return _max_difference(model.hidden(None, batch), again.hidden(None, batch))


def _max_difference(here: Tensor, there: Tensor) -> float:
    """Return the largest absolute difference, NaN where a value is. LogitsError for different shapes."""
    if here.shape != there.shape:
        raise LogitsError(f"the logits have shape {tuple(here.shape)} here, {tuple(there.shape)} there")
    return float((here - there).abs().max())
