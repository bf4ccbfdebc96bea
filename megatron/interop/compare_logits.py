"""Our model and transformers' of the same weights on the same tokens: how far apart their logits are.

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
from megatron.interop.tensor_mapping import Row
from megatron.model.bert import Bert
from megatron.model.build import build_stages
from megatron.model.gpt import GPT
from megatron.model.task_heads import FineTuned
from megatron.model.transformer import Transformer
from megatron.parallel.random import derive_seed
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.plan.stages import stages_of_model

TOLERANCE = 1e-4
RANDOM_TOLERANCE = 2e-5  # of the largest logit; rounding makes up to 3e-6, the tanh approximation of GELU 4e-5 and more
MAX_PROMPT = 256

Pair = tuple[Tensor, Tensor]  # the same logits, of our model and of transformers'


class LogitsError(Exception):
    """The two models are not the same, or transformers cannot open its own."""


class NoTransformersError(LogitsError):
    """transformers is not installed."""


@dataclass(frozen=True)
class Agreement:
    """largest: the largest difference of logits with the models' own weights. positions: how many tokens were compared."""

    largest: float
    positions: int


def import_transformers() -> Any:
    """The package, told to stay offline and silent. NoTransformersError where it is not installed."""
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


def open_theirs(directory: Path, name: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model in a Hugging Face directory in evaluation mode, and what transformers says of its tensors.

    name: of the class in transformers. LogitsError when it does not open, or not without inventing weights.
    """
    transformers = import_transformers()
    try:
        model, info = getattr(transformers, name).from_pretrained(
            str(directory), local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise LogitsError(f"transformers cannot open it: {type(error).__name__}: {error}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise LogitsError(f"transformers finds {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:20]))}")
    model.config.return_dict = True  # a file can ask for tuples, which the models of transformers 5 themselves cannot read
    return model.float().eval(), info


def compared_with_source(directory: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
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
    architecture = family.written_class(config).architecture
    if not known_to_transformers(architecture):
        return f"not compared with transformers' logits: transformers has no {architecture}"
    name = "AutoModelForCausalLM" if config.architecture == "gpt" else architecture
    theirs, _ = open_theirs(directory, name, dtype=torch.float32)
    found = agree(model_with(config, weights), theirs, family, [])
    return f"transformers' logits differ by at most {found.largest:.2e} (fp32, {found.positions} positions)"


def model_with(config: ModelConfig, weights: Mapping[str, Tensor]) -> Transformer:
    """A whole model in evaluation mode, fp32, with these weights, by our names."""
    plan = stages_of_model(config)
    model = build_stages(config, plan.placement, plan.parts, TensorParallel.alone(), 0)[0].eval()
    for shard in ModuleWeights(model).shards():
        shard.data.copy_(weights[shard.name])
    return model


def agree(ours: Transformer, theirs: Any, family: HFFamily, prompts: Sequence[Sequence[int]]) -> Agreement:
    """Compare two models, whose weights are random afterwards.

    Args:
        ours: whole, fp32, in evaluation mode.
        theirs: of transformers, likewise.
        family: whose table says which weights are the same.
        prompts: token ids of texts, to which one that goes through the vocabulary is added.

    Returns:
        How well they agree.

    Raises:
        LogitsError: when they differ by more than rounding does.
    """
    numbers = prompt_of(ours.config)
    prompts = [numbers, *(ids for ids in prompts if ids)]
    largest = 0.0
    for here, there in pairs(ours, theirs, prompts):
        difference, allowed = _largest(here, there), TOLERANCE * max(1.0, float(there.abs().max()) / 10)
        if not difference <= allowed:  # also when it is NaN
            raise LogitsError(f"the logits differ by {difference:.2e}, more than {allowed:.1g}")
        largest = max(largest, difference)
    _randomize(ours, theirs, family)
    for faint in (False, True):
        if faint:
            _faint(ours, theirs, family)
        for here, there in pairs(ours, theirs, [numbers, numbers[: len(numbers) // 2 + 1]]):
            difference, scale = _largest(here, there), float(there.abs().max())
            if not difference <= RANDOM_TOLERANCE * scale:
                kind = "random weights and faint embeddings" if faint else "random weights"
                raise LogitsError(f"with {kind} in both models the logits differ by {difference:.2e}, of {scale:.2e}")
    return Agreement(largest, sum(map(len, prompts)))


def prompt_of(config: ModelConfig) -> list[int]:
    """A prompt that goes through the vocabulary from end to end, as long as the model sees and at most MAX_PROMPT tokens."""
    vocab = config.known_vocab_size
    length = min(MAX_PROMPT, config.max_position_embeddings)
    return [(i * max(1, vocab // length) + i * i) % vocab for i in range(length - 1)] + [vocab - 1]


def _randomize(ours: Transformer, theirs: Any, family: HFFamily) -> None:
    """The same random weights in both models: matrices that keep the size of what they multiply, norms and biases about it."""
    mine = {shard.name: shard.data for shard in ModuleWeights(ours).shards()}
    there = dict(theirs.named_parameters())  # tied ones once
    with torch.no_grad():
        for row in family.table(ours.config):
            if row.ours in mine:
                mine[row.ours].copy_(_random(row.ours, mine[row.ours]))
                value = mine[row.ours]
            elif row.zeros is not None:
                value = torch.zeros(row.zeros(ours.config))
            else:
                continue  # the output layer of a tied model
            _put(there, row, value, ours.config)
    if there:
        raise LogitsError(f"transformers' model has weights that no tensor here becomes: {', '.join(sorted(there)[:20])}")


def _put(there: dict[str, Any], row: Row, value: Tensor, config: ModelConfig) -> None:
    """One tensor of ours into transformers' parameters, which are taken out of `there`."""
    for name, tensor in zip(row.theirs, row.form.write(value, config), strict=True):
        parameter = there.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            raise LogitsError(f"transformers' model has no {name} of shape {tuple(tensor.shape)}")
        parameter.copy_(tensor)


def _random(name: str, like: Tensor) -> Tensor:
    noise: Tensor = torch.randn(like.shape, generator=torch.Generator().manual_seed(derive_seed(5, name)))
    if name.startswith("embedding."):
        return noise
    if like.dim() == 2:
        return noise / sqrt(like.shape[1])
    return 0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.1)


def _faint(ours: Transformer, theirs: Any, family: HFFamily) -> None:
    """Scale the embeddings of both models, so that their variance is about the epsilon of the norms."""
    scale = ours.config.layernorm_epsilon**0.5
    mine = {shard.name: shard.data for shard in ModuleWeights(ours).shards()}
    there = dict(theirs.named_parameters())
    with torch.no_grad():
        for row in family.table(ours.config):
            if row.ours.startswith("embedding.") and row.ours in mine:
                mine[row.ours].mul_(scale)
                _put(there, row, mine[row.ours], ours.config)


def pairs(ours: Transformer, theirs: Any, prompts: Sequence[Sequence[int]]) -> Iterator[Pair]:
    """For a GPT of each prompt; for a BERT of all in one padded batch, and of the binary head."""
    if isinstance(ours, FineTuned):
        for ids in prompts:
            yield from _task_pairs(ours, theirs, ids)
    elif isinstance(ours, Bert):
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts])
        yield from bert_logits(ours, theirs, tokens, torch.tensor([len(ids) for ids in prompts]))
    elif isinstance(ours, GPT):
        yield from (gpt_logits(ours, theirs, torch.tensor([ids])) for ids in prompts)


def _task_pairs(ours: FineTuned, theirs: Any, prompt: Sequence[int]) -> Iterator[Pair]:
    """Logits of a task's head on one row for each choice, padded but for the first.

    prompt: token ids; the second half of each row is the second segment.
    """
    rows = max(2, len(ours.config.labels)) if ours.config.task_head == "choice" else 2
    short = torch.arange(rows).clamp(max=len(prompt) - 1)
    tokens = torch.tensor([[*prompt[less:], *[0] * less] for less in short.tolist()])
    padding = torch.arange(len(prompt)) >= len(prompt) - short[:, None]
    batch, segments = _bert_batch(ours, tokens, padding)
    words = {"input_ids": tokens, "attention_mask": (~padding).long(), "token_type_ids": segments}
    if ours.config.task_head == "choice":
        words = {name: None if values is None else values[None] for name, values in words.items()}
    with torch.no_grad():
        found, answers = _answer(theirs, **words), ours.task_logits(ours.hidden(None, batch), batch)
        if ours.config.task_head == "span":
            for here, there in zip(answers, (found.start_logits, found.end_logits), strict=True):
                yield here[~padding], there[~padding]
        else:
            seen = ~padding if answers.dim() == 3 else slice(None)
            yield answers[seen], found.logits[seen]


def _bert_batch(ours: Transformer, tokens: Tensor, padding: Tensor) -> tuple[Batch, Tensor | None]:
    """Rows with the second half of each as the second segment; and the segments, None for a model without token types."""
    places, lengths = torch.arange(tokens.shape[1]).expand_as(tokens), (~padding).sum(dim=1, keepdim=True)
    segments = ((2 * places >= lengths) & ~padding).long() if ours.config.num_token_types else None
    documents = padding.long() if padding.any() else None
    names = torch.zeros(len(tokens), dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones(tokens.shape), places, names, documents, segments=segments), segments


def bert_logits(ours: Bert, theirs: Any, tokens: Tensor, lengths: Tensor) -> Iterator[Pair]:
    """Yield the logits of the masked words of both models, then those of the binary head where there is one.

    tokens: `[batch, seq]`; lengths: `[batch]`, what follows is padding. The second half of each row is the second segment.
    """
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    batch, segments = _bert_batch(ours, tokens, padding)
    with torch.no_grad():
        final = ours.hidden(None, batch)
        found = _answer(theirs, input_ids=tokens, attention_mask=(~padding).long(), token_type_ids=segments)
        words = found.prediction_logits if ours.order is not None else found.logits
        yield ours.logits(final).transpose(0, 1)[~padding], words[~padding]
        if ours.order is not None:
            yield ours.order_logits(final), found.seq_relationship_logits


def gpt_logits(ours: GPT, theirs: Any, tokens: Tensor) -> Pair:
    """Return the logits of both models on `[batch, seq]` token ids."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, tokens, torch.ones(tokens.shape), positions, torch.zeros(len(tokens), dtype=torch.int64))
    with torch.no_grad():
        return ours.logits(ours.hidden(None, batch)).transpose(0, 1), _answer(theirs, input_ids=tokens).logits


def _answer(theirs: Any, **words: Tensor | None) -> Any:
    try:
        return theirs(**words)
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise LogitsError(f"transformers cannot run it: {type(error).__name__}: {error}") from error


def states_differ(ours: Transformer, again: Transformer) -> float:
    """Return the largest difference of two of our models' last hidden states, on a prompt that goes through the vocabulary."""
    tokens = torch.tensor([prompt_of(ours.config)])
    batch, _ = _bert_batch(ours, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    with torch.no_grad():
        return _largest(ours.hidden(None, batch), again.hidden(None, batch))


def _largest(here: Tensor, there: Tensor) -> float:
    if here.shape != there.shape:
        raise LogitsError(f"the logits have shape {tuple(here.shape)} here, {tuple(there.shape)} there")
    return float((here - there).abs().max())
