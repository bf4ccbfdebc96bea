"""Write imported weights and their tokenizer as a checkpoint, after comparing them with the model's names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from megatron.checkpoint.hugging_face_files import checkpoint_assets
from megatron.checkpoint.layout import CheckpointError
from megatron.config.rules import out_of_range
from megatron.config.schema import ModelConfig, RunSettings, TokenizerConfig
from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.interop.whole_tensors import check_save_root, write_weights
from megatron.model.build import build_stages
from megatron.parallel.spec import param_spec
from megatron.parallel.tensor_parallel import TensorParallel
from megatron.plan.stages import plan_model_stages

NO_FILES: Mapping[str, bytes] = MappingProxyType({})


def write_imported(
    root: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
    iteration: int = 0,
    kept: Mapping[str, bytes] = NO_FILES,
) -> Path:
    """Write the checkpoint `root/iter_<iteration>`, weights only.

    Args:
        root: the directory of checkpoints.
        config: the resolved configuration.
        weights: the whole tensors under our global names.
        tokenizer: the tokenizer to store in the checkpoint, None without one.
        iteration: the checkpoint's iteration.
        kept: name -> content of the other files of the imported Hugging Face directory, as `side_files.read_side_files`
            returns them.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: names or shapes of the weights are not the model's, or `root` holds other checkpoints.
    """
    check_save_root(root, iteration)
    check_weights(config, weights)
    run = RunSettings(model=config, tokenizer=TokenizerConfig(tokenizer_type=tokenizer.kind if tokenizer else None))
    return write_weights(root, iteration, run, weights, checkpoint_assets(tokenizer, kept))


def vocabulary_mismatch(config: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """Return a note if a model's vocabulary and its tokenizer's differ in size; None if they are equal."""
    rows, tokens = config.known_vocab_size, tokenizer.vocab_size
    if rows == tokens:
        return None
    advice = f"to continue training with this tokenizer, import with --vocab-size {tokens}"
    if tokens < rows:
        return f"the tokenizer has {tokens} tokens, the model {rows}; {advice}"
    names = ", ".join(repr(tokenizer.piece(number)) for number in range(rows, min(tokens, rows + 5)))
    more = ", ..." if tokens > rows + 5 else ""
    return (
        f"the tokenizer has {tokens} tokens, the model {rows}: there is no row for {names}{more}, and a text with such a token "
        f"is refused; {advice}, which adds rows"
    )


def check_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes of weights with those of a model.

    Args:
        config: the resolved configuration, whose values may still be out of range.
        weights: the whole tensors under our global names.

    Raises:
        CheckpointError: names or shapes differ, or no model can be built from the configuration.
    """
    layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    if config.num_layers != layers:  # checked before a huge number of layers is built
        raise CheckpointError(f"its settings say {config.num_layers} layers, but its weights have {layers}")
    try:
        if problems := [problem for _, problem in out_of_range(RunSettings(model=config))]:
            raise ValueError("; ".join(map(str, problems)))
        plan = plan_model_stages(config)
        stages = build_stages(
            config, plan.placement, plan.parts, TensorParallel.alone(), 0, device="meta"
        )  # shapes only, without memory
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"its settings describe no model: {error}") from error
    shapes = {param_spec(p).name: param_spec(p).shape for stage in stages.values() for p in stage.parameters()}
    wrong = [f"{name} is missing" for name in sorted(shapes.keys() - weights.keys())]
    wrong += [f"{name} is not part of the model" for name in sorted(weights.keys() - shapes.keys())]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != tuple(shape)
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"the weights are not those of a model with its settings: {'; '.join(wrong[:5])}{more}")


def tokenizer_from_flags(flags: TokenizerConfig) -> tuple[Tokenizer | None, int | None]:
    """Return the tokenizer that the flags name and the unpadded vocabulary size; None for each that they do not give.

    Raises:
        DataError: the tokenizer cannot be built, or its files are given without --tokenizer-type.
    """
    if flags.tokenizer_type is None:
        if flags != replace(TokenizerConfig(), vocab_size=flags.vocab_size):
            raise DataError("the tokenizer's files need --tokenizer-type")
        return None, flags.vocab_size
    tokenizer = build_tokenizer(flags)
    return tokenizer, tokenizer.vocab_size
