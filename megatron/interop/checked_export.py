"""Export a checkpoint as a Hugging Face directory, and verify it.

The directory appears under its name only after transformers has opened it and computed the same logits as this framework.
Where transformers has no class for a family that another package adds, the export is read back by our own importer instead.
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

# Settings that are compared with config.json, since logits alone do not reveal a difference in them.
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
    """The written export failed its verification, or transformers for the verification is not installed."""


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
        checkpoint: a directory of checkpoints, or one iter_ directory.
        output: the directory to create.
        iteration: the iteration to export; None for the latest.
        dtype: the dtype of the exported tensors; None for that of the checkpoint.
        verify: open the result with transformers and compare the fp32 logits of both models on fixed prompts, then again with
            random weights in both; a BERT's prompts are padded, and its binary head is compared too. Where transformers has no
            class for the model, the result is read back by our own importer, and tensors and hidden states are compared.
        overwrite: replace an earlier export.
        say: receives each line about what is done and what is left out.

    Returns:
        The iter_ directory that was exported.

    Raises:
        OutputError: `output` exists and may not be replaced, or is the directory that is read.
        CheckpointError, DataError: the checkpoint or its tokenizer cannot be read.
        ExportError: the verification failed; the files are then in the directory named `output` + `.failed`.
    """
    directory = find_checkpoint(Path(checkpoint), iteration, lambda line: say(f"note: {line}"))
    output = check_replaceable("--output", Path(output), [directory], overwrite=overwrite)
    failed_output = check_replaceable("--output", output.with_name(output.name + ".failed"), [directory], overwrite=True)
    if verify:
        _require_transformers()
    with PendingDirectory(output, "export_hf") as pending:
        tokenizer, exported_dtype = _write_directory(directory, pending.temporary, dtype, verify=verify, say=say)
        if verify:
            try:
                say(verify_export(directory, pending.temporary, tokenizer, exported_dtype))
            except ExportError as error:
                pending.commit(failed_output)  # so that the user can look for the fault
                raise ExportError(f"{error}. The written files are in {failed_output}") from error
        else:
            say("not verified (--no-verify)")
        pending.commit()
    return directory


def _require_transformers() -> None:
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
        The tokenizer whose files were written, None without one; and the dtype of the tensors.
    """
    tokenizer = open_tokenizer(directory)
    imported_files = read_kept_files(directory)
    files = with_chosen_eod(imported_files, tokenizer)
    say(f"writing {directory} as a Hugging Face directory")
    ids = kept_token_ids(files)
    ids = _special_token_ids(tokenizer) if ids is None else ids
    # Where several families can express the model, it is exported as the family that it was imported from.
    source = str((kept_config(imported_files) or {}).get("model_type"))
    exported_dtype = export_weights(
        directory, out, dtype, model_type=source, token_ids=ids, generation=legacy_generation_settings(files)
    )
    config = read_model_config(directory)
    for setting, reason in family_for_export(config, source).unwritten_settings.items():
        if getattr(config, setting):
            say(f"{reason}, so {getattr(config, setting):g} is not written")
    write_side_files(files, out)
    if tokenizer is None or isinstance(tokenizer, NullTokenizer):
        reason = "the checkpoint holds no tokenizer" if tokenizer is None else "a NullTokenizer has no text"
        say(f"no tokenizer files: {reason}")
        return None, exported_dtype
    if has_tokenizer(files):
        say("tokenizer files and generation settings are written as they were imported")
        if files != imported_files:
            say(f"but {describe_token(tokenizer, tokenizer.eod)}, chosen by --eod-token, ends a text too")
        if verify:
            _check_tokenizer(out, tokenizer)
    else:
        segments = config.architecture == "bert" and config.bert_binary_head
        tokenizer.hf_files(out, config.max_position_embeddings, segments=segments)
    return tokenizer, exported_dtype


def _special_token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the fields of config.json about special tokens, for models without imported files.

    Where the tokenizer has no token that begins a text, the one that ends a text is used for it.
    """
    special = dict(tokenizer.special) if tokenizer else {}
    ids = {"bos": special.get("bos", special.get("eod")), "eos": special.get("eod"), "pad": special.get("pad")}
    return {f"{role}_token_id": number for role, number in ids.items()}


def _check_tokenizer(exported: Path, tokenizer: Tokenizer) -> None:
    """Compare the tokenizer that transformers opens in the exported directory with the checkpoint's.

    An export may have another `model_type` than the directory that was imported, and transformers may then interpret the same
    tokenizer files differently. In that case the checkpoint's tokenizer.json is written instead, with PreTrainedTokenizerFast
    as its class, which uses the file unchanged, and the comparison is repeated. ExportError when it fails again.
    """
    for rewritten in (False, True):
        try:
            difference = tokenizer_difference(tokenizer, auto_tokenizer(exported))
        except TokenizerError as error:
            difference = str(error)
        if difference is None:
            return
        if rewritten:
            raise ExportError(f"the tokenizers disagree: {difference}")
        tokenizer.backend().save(str(exported / "tokenizer.json"), pretty=False)
        path = exported / "tokenizer_config.json"
        tokenizer_config = read_json_object(path)
        roles = {f"{role}_token": tokenizer.piece(tokenizer.special[role]) for role in ROLES if role in tokenizer.special}
        tokenizer_config |= {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        path.write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify_export(directory: Path, exported: Path, tokenizer: Tokenizer | None, dtype: torch.dtype) -> str:
    """Compare an export with its checkpoint, by transformers or, where it has no class for the model, by our own importer.

    Both models compute in fp32, from weights rounded to the exported dtype.

    Args:
        directory: the checkpoint's iter_ directory.
        exported: the Hugging Face directory.
        tokenizer: the tokenizer whose files were exported, None without one.
        dtype: the dtype of the exported tensors.

    Returns:
        A line about what was compared, and the largest difference.

    Raises:
        ExportError: transformers cannot open the directory, or finds unexpected weights in it; or settings, tokenizers or
            logits differ.
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
            raise ExportError(f"the tokenizers disagree on {text!r}: {ids} here, {hf_ids} in transformers")
        # The model may have fewer rows than the tokenizer has tokens.
        with_rows = [number for number in ids if number < opened.config.known_vocab_size]
        prompts.append(with_rows[: opened.config.max_position_embeddings])
    try:
        agreement = compare_models(opened.model, hf_model, family, prompts)
    except LogitsError as error:
        raise ExportError(str(error)) from error
    return f"transformers opens it; logits differ by at most {agreement.largest:.2e} (fp32, {agreement.positions} positions)"


def _round_weights(model: Transformer, family: HFFamily, dtype: torch.dtype) -> None:
    """Round the weights of a model as its export in `dtype` rounded them, so that the logits can be equal."""
    weights = {shard.name: shard.data for shard in ModuleWeights(model).shards()}
    for name, value in family.rounded(weights, model.config, dtype).items():
        weights[name].copy_(value)


def _verify_by_reading_back(directory: Path, exported: Path, family: HFFamily, dtype: torch.dtype) -> str:
    """Read the export with our own importer, compare every tensor and the hidden states, and return a line about the result.

    This shows that the family's import inverts its export, not that another program computes the same from the files.
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
        if not all(torch.equal(original.to(dtype), reread.to(dtype)) for original, reread in pairs):
            raise ExportError(f"read back, {row.native} is another tensor")
    _round_weights(opened.model, family, dtype)
    architecture, difference = family.exported_class(config).architecture, hidden_state_difference(opened.model, read_back)
    if not difference <= LOGIT_TOLERANCE:
        raise ExportError(f"read back, its hidden states differ by {difference:.2e}, more than {LOGIT_TOLERANCE:.1g}")
    return (
        f"transformers has no {architecture}, so no logits are compared; read back here, all {len(weights_back)} tensors equal "
        f"the checkpoint's, and hidden states differ by at most {difference:.2e}"
    )


def _check_settings(config: ModelConfig, family: HFFamily, hf_config: Mapping[str, Any]) -> None:
    """Raise ExportError where a setting read back from config.json differs from the checkpoint's."""
    read_back = config_from_hf(hf_config, family)
    for name in COMPARED_SETTINGS:
        if getattr(read_back, name) != getattr(config, name) and name not in family.unwritten_settings:
            raise ExportError(f"config.json says {name} {getattr(read_back, name)}, the checkpoint {getattr(config, name)}")
