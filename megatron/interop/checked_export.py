"""Export a checkpoint to a Hugging Face directory, and prove it.

It appears under its name only once transformers has opened it and computed the same logits as this framework.

A family that transformers has no class for, which another package brought, is read back here instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.find import find
from megatron.checkpoint.layout import CheckpointError
from megatron.checkpoint.model_config import model_config
from megatron.checkpoint.side_files import in_checkpoint, kept_config, token_ids
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
from megatron.interop import side_files as kept
from megatron.interop.compare_logits import (
    TOLERANCE,
    LogitsError,
    NoTransformersError,
    agree,
    import_transformers,
    known_to_transformers,
    model_with,
    open_theirs,
    states_differ,
)
from megatron.interop.families.family import HFFamily
from megatron.interop.families.table import family_named, family_of
from megatron.interop.hf_config import model_settings
from megatron.interop.hf_export import export_hf
from megatron.interop.hf_import import read_hf
from megatron.interop.hf_tokenizers import TokenizerError, auto_tokenizer, disagreement
from megatron.launch.packages import install_command
from megatron.model.transformer import Transformer

# What config.json must say, beside what the logits show.
SETTINGS = (
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


def export(
    checkpoint: Path | str,
    output: Path | str,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write `output` from a checkpoint of any layout; returns the iter_ directory it was made from.

    dtype: of the tensors, default as saved. verify: open the result with transformers and compare the fp32 logits of both
    models on fixed prompts, of a BERT with padding, and those of its binary head too; then again with random weights in both.
    Where transformers has no such class, the result is read back here, and tensors and hidden states are compared.
    overwrite: replace an earlier export.
    OutputError for a place that is taken or read; CheckpointError or DataError for a bad checkpoint; ExportError when the proof
    fails, and then what was written is `output` with `.failed` behind its name.
    """
    directory = find(Path(checkpoint), iteration, lambda line: say(f"note: {line}"))
    output = check_replaceable("--output", Path(output), [directory], overwrite=overwrite)
    failed = check_replaceable("--output", output.with_name(output.name + ".failed"), [directory], overwrite=True)
    if verify:
        _need_transformers()
    with PendingDirectory(output, "export_hf") as pending:
        tokenizer, written = _write(directory, pending.temporary, dtype, verify=verify, say=say)
        if verify:
            try:
                say(prove(directory, pending.temporary, tokenizer, written))
            except ExportError as error:
                pending.commit(failed)
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


def _write(
    directory: Path, out: Path, dtype: torch.dtype | None, *, verify: bool, say: Callable[[str], None]
) -> tuple[Tokenizer | None, torch.dtype]:
    """Write all files of the Hugging Face directory `out`: configuration, weights, tokenizer and generation settings.

    Returns:
        The tokenizer whose files are in it, or None, and the type of the tensors.
    """
    tokenizer = open_tokenizer(directory)
    imported = in_checkpoint(directory)
    files = kept.with_chosen_end(imported, tokenizer)
    say(f"writing {directory} as a Hugging Face directory")
    ids = token_ids(files)
    special = _token_ids(tokenizer) if ids is None else ids
    # What came from a family goes back to it, where several families can say the same.
    source = str((kept_config(imported) or {}).get("model_type"))
    written = export_hf(directory, out, dtype, model_type=source, special=special, generation=kept.old_settings(files))
    config = model_config(directory)
    for setting, why in family_of(config, source).unwritten.items():
        if getattr(config, setting):
            say(f"{why}, so {getattr(config, setting):g} is not written")
    kept.write(files, out)
    if tokenizer is None or isinstance(tokenizer, NullTokenizer):
        what = "the checkpoint holds no tokenizer" if tokenizer is None else "a NullTokenizer has no text"
        say(f"no tokenizer files: {what}")
        return None, written
    if kept.has_tokenizer(files):
        say("tokenizer files and generation settings as they were imported")
        if files != imported:
            say(f"but for the end of a text, which is also {describe_token(tokenizer, tokenizer.eod)}, chosen by --eod-token")
        if verify:
            _same_tokenizer(out, tokenizer)
    else:
        segments = config.architecture == "bert" and config.bert_binary_head
        tokenizer.hf_files(out, config.max_position_embeddings, segments=segments)
    return tokenizer, written


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """What config.json says of special tokens where nothing else does."""
    special = dict(tokenizer.special) if tokenizer else {}
    ids = {"bos": special.get("bos", special.get("eod")), "eos": special.get("eod"), "pad": special.get("pad")}
    return {f"{role}_token_id": number for role, number in ids.items()}


def _same_tokenizer(exported: Path, tokenizer: Tokenizer) -> None:
    """Compare transformers' tokenizer of the exported directory with the checkpoint's. ExportError when they differ.

    A family may stand under another name than at its source, and transformers then read the same files in another way. So
    where they differ the checkpoint's own tokenizer.json is written, under the class that takes it as it is.
    """
    for last in (False, True):
        try:
            why = disagreement(tokenizer, auto_tokenizer(exported))
        except TokenizerError as error:
            why = str(error)
        if why is None:
            return
        if last:
            raise ExportError(f"the tokenizers disagree: {why}")
        tokenizer.backend().save(str(exported / "tokenizer.json"), pretty=False)
        path = exported / "tokenizer_config.json"
        about = read_json_object(path)
        roles = {f"{role}_token": tokenizer.piece(tokenizer.special[role]) for role in ROLES if role in tokenizer.special}
        about |= {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prove(directory: Path, exported: Path, tokenizer: Tokenizer | None, written: torch.dtype) -> str:
    """Compare an export with its checkpoint: opened by transformers, or read back here where that has no such class.

    Both models compute in fp32 from the weights in the type that was written.

    Args:
        directory: the checkpoint's.
        exported: the Hugging Face directory.
        tokenizer: whose files are in it, if any.
        written: the type of its tensors.

    Returns:
        A line that says what was compared, and how far it differs.

    Raises:
        ExportError: when the directory does not open cleanly, when its settings or the tokenizers disagree, or the logits do.
    """
    about = read_json(exported / "config.json")
    family = family_named(about["model_type"])
    if not known_to_transformers(about["architectures"][0]):
        return _read_back(directory, exported, family, written)
    try:
        transformers = import_transformers()
        theirs, info = open_theirs(exported, about["architectures"][0])
        words = None
        if tokenizer is not None:
            words = transformers.AutoTokenizer.from_pretrained(str(exported), local_files_only=True)
    except LogitsError as error:
        raise ExportError(str(error)) from error
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise ExportError(f"transformers cannot open it: {type(error).__name__}: {error}") from error
    if unexpected := info["unexpected_keys"]:
        raise ExportError(f"transformers finds unexpected keys: {', '.join(map(str, sorted(unexpected)[:20]))}")
    ours = open_model(directory, dtype=torch.float32)
    _same_settings(ours.config, family, about)
    _round(ours.model, family, written)
    prompts = []
    for text in PROMPTS:
        if tokenizer is None or words is None:
            continue
        ids = tokenizer.tokenize(text)
        if (got := words(text, add_special_tokens=False)["input_ids"]) != ids:
            raise ExportError(f"the tokenizers disagree on {text!r}: {ids} here, {got} there")
        within = [number for number in ids if number < ours.config.known_vocab_size]  # there may be fewer rows than tokens
        prompts.append(within[: ours.config.max_position_embeddings])
    try:
        found = agree(ours.model, theirs, family, prompts)
    except LogitsError as error:
        raise ExportError(str(error)) from error
    return f"transformers opens it; logits differ by at most {found.largest:.2e} (fp32, {found.positions} positions)"


def _round(model: Transformer, family: HFFamily, written: torch.dtype) -> None:
    """Round the weights of a model as those of its export are."""
    weights = {shard.name: shard.data for shard in ModuleWeights(model).shards()}
    for name, value in family.rounded(weights, model.config, written).items():
        weights[name].copy_(value)


def _read_back(directory: Path, exported: Path, family: HFFamily, written: torch.dtype) -> str:
    """Read what was exported with our own reader, and compare every tensor and the hidden states; returns what was compared.

    This shows that the family's two directions belong together, not that another program computes the same.
    """
    ours = open_model(directory, dtype=torch.float32)
    _same_settings(ours.config, family, read_json(exported / "config.json"))
    try:
        config, found = read_hf(exported, say=lambda line: None)
        again = model_with(config, found)
    except (CheckpointError, KeyError, RuntimeError) as error:
        raise ExportError(f"it cannot be read back: {error}") from error
    weights = {shard.name: shard.data for shard in ModuleWeights(ours.model).shards()}
    for row in family.table(ours.config):
        if row.ours not in weights:
            continue
        pairs = zip(row.form.write(weights[row.ours], ours.config), row.form.write(found[row.ours], config), strict=True)
        if not all(torch.equal(here.to(written), there.to(written)) for here, there in pairs):
            raise ExportError(f"read back, {row.ours} is another tensor")
    _round(ours.model, family, written)
    architecture, difference = family.written_class(config).architecture, states_differ(ours.model, again)
    if not difference <= TOLERANCE:
        raise ExportError(f"read back, its hidden states differ by {difference:.2e}, more than {TOLERANCE:.1g}")
    return (
        f"transformers has no {architecture}, so no logits are compared; read back here, all {len(found)} tensors are the "
        f"checkpoint's, and hidden states differ by at most {difference:.2e}"
    )


def _same_settings(config: ModelConfig, family: HFFamily, about: Mapping[str, Any]) -> None:
    """ExportError when config.json does not say what the logits cannot show: what training needs, and the vocabulary."""
    back = model_settings(about, family)
    for name in SETTINGS:
        if getattr(back, name) != getattr(config, name) and name not in family.unwritten:
            raise ExportError(f"config.json says {name} {getattr(back, name)}, the checkpoint {getattr(config, name)}")
