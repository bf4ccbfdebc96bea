"""Export a checkpoint as a Hugging Face directory, and verify it.

It appears under its name only once transformers has opened it and computed the same logits as this framework.

A family that transformers has no class for, which another package brought, is read back here instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.hugging_face_files import kept_config, kept_token_ids, read_kept_files
from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.model_config import read_model_config
from megatron.checkpoint.tokenizer import open_tokenizer
from megatron.checkpoint.weights import ModuleWeights
from megatron.config.schema import ModelConfig
from megatron.data.hugging_face import ROLES, read_json_object
from megatron.data.special_tokens import describe_token
from megatron.data.tokenizer import NullTokenizer, Tokenizer
from megatron.files.outputs import check_replaceable
from megatron.files.pending import PendingDirectory
from megatron.files.regular import read_json
from megatron.inference.restore import open_model
from megatron.interop.compare_logits import (
    LOGIT_TOLERANCE,
    LogitsError,
    NoTransformersError,
    compare_models,
    hidden_state_difference,
    import_transformers,
    known_to_transformers,
    model_from_weights,
    open_in_transformers,
)
from megatron.interop.families.family import HFFamily
from megatron.interop.families.table import family_for_export, family_named
from megatron.interop.hf_config import config_from_hf
from megatron.interop.hf_export import export_weights
from megatron.interop.hf_import import read_hf
from megatron.interop.hf_tokenizers import TokenizerError, auto_tokenizer, tokenizer_difference
from megatron.interop.side_files import has_tokenizer, legacy_generation_settings, with_chosen_eod, write_side_files
from megatron.launch.packages import install_command
from megatron.model.transformer import Transformer

# Settings that config.json must hold, since the logits do not show them.
COMPARED_SETTINGS = (
    "vocab_size",
    "max_position_embeddings",
    "layernorm_epsilon",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "untie_embeddings_and_output_weights",
)
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning, 1 + 1 was 2; isn't it still?",
    "def f(x):\n    return x ** 2\n",
)


class ExportError(Exception):
    """The export was written and does not hold what it should, or could not be tried."""


def export_hf(
    checkpoint: Path | str,
    output: Path | str,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Export a checkpoint of any layout as a Hugging Face directory.

    Args:
        checkpoint: directory of checkpoints, or one iter_ directory.
        output: the directory to make.
        iteration: default the latest.
        dtype: of the tensors, default as saved.
        verify: open the result with transformers and compare the fp32 logits of both models on fixed prompts, of a BERT with
            padding, and those of its binary head too; then again with random weights in both. Where transformers has no such
            class, the result is read back here, and tensors and hidden states are compared.
        overwrite: replace an earlier export.
        say: is told, a line each, what is done and what is left out.

    Returns:
        The iter_ directory that was exported.

    Raises:
        OutputError: for a place that is taken or read.
        CheckpointError, DataError: for a bad checkpoint.
        ExportError: when the verification fails, and then what was written is `output` with `.failed` behind its name.
    """
    directory = find_checkpoint(Path(checkpoint), iteration, lambda line: say(f"note: {line}"))
    output = check_replaceable("--output", Path(output), [directory], overwrite=overwrite)
    failed = check_replaceable("--output", output.with_name(output.name + ".failed"), [directory], overwrite=True)
    if verify:
        _need_transformers()
    with PendingDirectory(output, "export_hf") as pending:
        tokenizer, written = _write_directory(directory, pending.temporary, dtype, verify=verify, say=say)
        if verify:
            try:
                say(verify_export(directory, pending.temporary, tokenizer, written))
            except ExportError as error:
                pending.commit(failed)  # for whoever looks for the fault
                raise ExportError(f"{error}. What was written is {failed}") from error
        else:
            say("not verified (--no-verify)")
        pending.commit()
    return directory


def _need_transformers() -> None:
    """Raise ExportError, before anything is written, where transformers cannot be imported."""
    try:
        import_transformers()
    except NoTransformersError as error:
        raise ExportError(
            f"{error}, so the export cannot be verified: {install_command('transformers')}, or pass --no-verify"
        ) from error


def _write_directory(
    directory: Path, out: Path, dtype: torch.dtype | None, *, verify: bool, say: Callable[[str], None]
) -> tuple[Tokenizer | None, torch.dtype]:
    """Write all files of the Hugging Face directory `out`: configuration, weights, tokenizer and generation settings.

    Returns:
        The tokenizer whose files are in it, or None, and the type of the tensors.
    """
    tokenizer = open_tokenizer(directory)
    imported = read_kept_files(directory)
    files = with_chosen_eod(imported, tokenizer)
    say(f"writing {directory} as a Hugging Face directory")
    ids = kept_token_ids(files)
    ids = _special_token_ids(tokenizer) if ids is None else ids
    # Weights that came from a family go back to it, where several families can express the model.
    source = str((kept_config(imported) or {}).get("model_type"))
    written = export_weights(
        directory, out, dtype, model_type=source, token_ids=ids, generation=legacy_generation_settings(files)
    )
    config = read_model_config(directory)
    for setting, why in family_for_export(config, source).unwritten_settings.items():
        if getattr(config, setting):
            say(f"{why}, so {getattr(config, setting):g} is not written")
    write_side_files(files, out)
    if tokenizer is None or isinstance(tokenizer, NullTokenizer):
        what = "the checkpoint holds no tokenizer" if tokenizer is None else "a NullTokenizer has no text"
        say(f"no tokenizer files: {what}")
        return None, written
    if has_tokenizer(files):
        say("tokenizer files and generation settings as they were imported")
        if files != imported:
            say(f"but for the end of a text, which is also {describe_token(tokenizer, tokenizer.eod)}, chosen by --eod-token")
        if verify:
            _check_tokenizer(out, tokenizer)
    else:
        segments = config.architecture == "bert" and config.bert_binary_head
        tokenizer.hf_files(out, config.max_position_embeddings, segments=segments)
    return tokenizer, written


def _special_token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the fields of config.json about special tokens where no imported file has them. A text begins as it ends."""
    special = dict(tokenizer.special) if tokenizer else {}
    ids = {"bos": special.get("bos", special.get("eod")), "eos": special.get("eod"), "pad": special.get("pad")}
    return {f"{role}_token_id": number for role, number in ids.items()}


def _check_tokenizer(exported: Path, tokenizer: Tokenizer) -> None:
    """Compare transformers' tokenizer of the exported directory with the checkpoint's. ExportError when they differ.

    A family may stand under another name than at its source, and transformers then read the same files in another way. So
    where they differ the checkpoint's own tokenizer.json is written, under the class that takes it as it is.
    """
    for last in (False, True):
        try:
            why = tokenizer_difference(tokenizer, auto_tokenizer(exported))
        except TokenizerError as error:
            why = str(error)
        if why is None:
            return
        if last:
            raise ExportError(f"the tokenizers disagree: {why}")
        tokenizer.backend().save(str(exported / "tokenizer.json"), pretty=False)
        path = exported / "tokenizer_config.json"
        tokenizer_config = read_json_object(path)
        roles = {f"{role}_token": tokenizer.piece(tokenizer.special[role]) for role in ROLES if role in tokenizer.special}
        tokenizer_config |= {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        path.write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify_export(directory: Path, exported: Path, tokenizer: Tokenizer | None, dtype: torch.dtype) -> str:
    """Compare an export with its checkpoint: opened by transformers, or read back here where that has no such class.

    Both models compute in fp32 from the weights in the type that was written.

    Args:
        directory: the checkpoint's.
        exported: the Hugging Face directory.
        tokenizer: whose files are in it, if any.
        dtype: of its tensors.

    Returns:
        A line that says what was compared, and how far it differs.

    Raises:
        ExportError: when the directory does not open cleanly, when its settings or the tokenizers disagree, or the logits do.
    """
    hf_config = read_json(exported / "config.json")
    family = family_named(hf_config["model_type"])
    if not known_to_transformers(hf_config["architectures"][0]):
        return _verify_by_reading_back(directory, exported, family, dtype)
    try:
        transformers = import_transformers()
        hf_model, info = open_in_transformers(exported, hf_config["architectures"][0])
        hf_tokenizer = None
        if tokenizer is not None:
            hf_tokenizer = transformers.AutoTokenizer.from_pretrained(str(exported), local_files_only=True)
    except LogitsError as error:
        raise ExportError(str(error)) from error
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise ExportError(f"transformers cannot open it: {type(error).__name__}: {error}") from error
    if unexpected := info["unexpected_keys"]:
        raise ExportError(f"transformers finds unexpected keys: {', '.join(map(str, sorted(unexpected)[:20]))}")
    opened = open_model(directory, dtype=torch.float32)
    _check_settings(opened.config, family, hf_config)
    _round_weights(opened.model, family, dtype)
    prompts = []
    for text in PROMPTS:
        if tokenizer is None or hf_tokenizer is None:
            continue
        ids = tokenizer.tokenize(text)
        if (hf_ids := hf_tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
            raise ExportError(f"the tokenizers disagree on {text!r}: {ids} here, {hf_ids} there")
        within = [number for number in ids if number < opened.config.known_vocab_size]  # there may be fewer rows than tokens
        prompts.append(within[: opened.config.max_position_embeddings])
    try:
        agreement = compare_models(opened.model, hf_model, family, prompts)
    except LogitsError as error:
        raise ExportError(str(error)) from error
    return f"transformers opens it; logits differ by at most {agreement.largest:.2e} (fp32, {agreement.positions} positions)"


def _round_weights(model: Transformer, family: HFFamily, dtype: torch.dtype) -> None:
    """Round the weights of a model as those of its export in `dtype` are, so that the logits can be equal."""
    weights = {shard.name: shard.data for shard in ModuleWeights(model).shards()}
    for name, value in family.rounded(weights, model.config, dtype).items():
        weights[name].copy_(value)


def _verify_by_reading_back(directory: Path, exported: Path, family: HFFamily, dtype: torch.dtype) -> str:
    """Read the export with our own reader, and compare every tensor and the hidden states; returns a line about it.

    This shows that the family's two directions belong together, not that another program computes the same.
    """
    opened = open_model(directory, dtype=torch.float32)
    _check_settings(opened.config, family, read_json(exported / "config.json"))
    try:
        config, weights_back = read_hf(exported, say=lambda line: None)
        read_back = model_from_weights(config, weights_back)
    except (CheckpointError, KeyError, RuntimeError) as error:
        raise ExportError(f"it cannot be read back: {error}") from error
    weights = {shard.name: shard.data for shard in ModuleWeights(opened.model).shards()}
    for row in family.mappings(opened.config):
        if row.native not in weights:
            continue
        to_hf = row.conversion.to_hf
        pairs = zip(to_hf(weights[row.native], opened.config), to_hf(weights_back[row.native], config), strict=True)
        if not all(torch.equal(here.to(dtype), there.to(dtype)) for here, there in pairs):
            raise ExportError(f"read back, {row.native} is another tensor")
    _round_weights(opened.model, family, dtype)
    architecture, difference = family.exported_class(config).architecture, hidden_state_difference(opened.model, read_back)
    if not difference <= LOGIT_TOLERANCE:
        raise ExportError(f"read back, its hidden states differ by {difference:.2e}, more than {LOGIT_TOLERANCE:.1g}")
    return (
        f"transformers has no {architecture}, so no logits are compared; read back here, all {len(weights_back)} tensors are "
        f"the checkpoint's, and hidden states differ by at most {difference:.2e}"
    )


def _check_settings(config: ModelConfig, family: HFFamily, hf_config: Mapping[str, Any]) -> None:
    """Raise ExportError when config.json lacks what the logits cannot show: what training needs, and the vocabulary."""
    back = config_from_hf(hf_config, family)
    for name in COMPARED_SETTINGS:
        if getattr(back, name) != getattr(config, name) and name not in family.unwritten_settings:
            raise ExportError(f"config.json says {name} {getattr(back, name)}, the checkpoint {getattr(config, name)}")
