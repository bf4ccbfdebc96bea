"""A checkpoint as a Hugging Face directory that proves itself: it appears under its name only once transformers has opened it
and computed the same logits as this framework."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.hf import export_hf, model_config
from megatron.checkpoint.layout import find
from megatron.checkpoint.names import rounded
from megatron.checkpoint.weights import ModuleWeights
from megatron.contract import Batch
from megatron.data.tokenizer import NullTokenizer, Tokenizer
from megatron.files.outputs import check_replaceable
from megatron.files.pending import PendingDirectory
from megatron.model.bert import Bert
from megatron.model.gpt import GPT
from megatron.model.task_heads import FineTuned
from megatron.restore import open_model, open_tokenizer

TOLERANCE = 1e-4
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning, 1 + 1 was 2; isn't it still?",
    "def f(x):\n    return x ** 2\n",
)


class ExportError(Exception):
    """The export was written and does not hold what it should, or could not be tried."""


def export(
    checkpoint: Path,
    output: Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write `output` from a checkpoint of any layout; returns the iter_ directory it was made from.

    dtype: of the tensors, default as saved. verify: open the result with transformers and compare the fp32 logits of both
    models on fixed prompts, of a BERT with padding, and those of its binary head too. overwrite: replace an earlier
    export. BadOutput for a place that is taken or read; CheckpointError or DataError for a bad checkpoint; ExportError when
    the proof fails, and then what was written is `output` with `.failed` behind its name.
    """
    directory = find(checkpoint, iteration)
    output = check_replaceable("--output", output, [directory], overwrite=overwrite)
    failed = check_replaceable("--output", output.with_name(output.name + ".failed"), [directory], overwrite=True)
    if verify:
        _transformers()
    with PendingDirectory(output, "export_hf") as pending:
        temporary = pending.temporary
        tokenizer = open_tokenizer(directory)
        special = dict(tokenizer.special) if tokenizer else {}
        ids = {"eos": special.get("eod"), "bos": special.get("bos", special.get("eod")), "pad": special.get("pad")}
        say(f"writing {directory} as a Hugging Face directory")
        written = export_hf(directory, temporary, dtype, special={k: v for k, v in ids.items() if v is not None})
        if tokenizer is None or isinstance(tokenizer, NullTokenizer):
            what = "the checkpoint holds no tokenizer" if tokenizer is None else "a NullTokenizer has no text"
            say(f"no tokenizer files: {what}")
            tokenizer = None
        else:
            config = model_config(directory)
            segments = config.architecture == "bert" and config.bert_binary_head
            tokenizer.hf_files(temporary, config.size("max_position_embeddings"), segments=segments)
        if verify:
            try:
                difference, positions = prove(directory, temporary, tokenizer, written)
            except ExportError as error:
                pending.commit(failed)
                raise ExportError(f"{error}. What was written is {failed}") from error
            say(f"transformers opens it; logits differ by at most {difference:.2e} (fp32, {positions} positions)")
        else:
            say("not verified (--no-verify)")
        pending.commit()
    return directory


def _transformers() -> Any:
    """The package, told to stay offline and silent."""
    try:
        import transformers
    except ImportError as error:
        raise ExportError(
            "transformers is not installed, so the export cannot be verified: pip install transformers, or pass --no-verify"
        ) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def prove(directory: Path, exported: Path, tokenizer: Tokenizer | None, written: torch.dtype) -> tuple[float, int]:
    """Open `exported` with transformers and compare it with the checkpoint; the largest difference of logits, the positions.

    Both models compute in fp32 from the weights in the type that was written. ExportError when the directory does not open
    cleanly, when the tokenizers disagree, or when logits differ by more than TOLERANCE.
    """
    transformers = _transformers()
    try:
        architecture = json.loads((exported / "config.json").read_text())["architectures"][0]
        theirs, info = getattr(transformers, architecture).from_pretrained(
            str(exported), local_files_only=True, output_loading_info=True
        )
        words = transformers.AutoTokenizer.from_pretrained(str(exported), local_files_only=True) if tokenizer else None
    except Exception as error:  # whatever transformers trips over is what the user must hear
        raise ExportError(f"transformers cannot open it: {type(error).__name__}: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ExportError(f"transformers finds {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:20]))}")
    ours = open_model(directory, dtype=torch.float32)
    theirs = theirs.float().eval()
    weights = {shard.name: shard.data for shard in ModuleWeights(ours.model).shards()}
    for name, value in rounded(weights, ours.config, written).items():
        weights[name].copy_(value)
    prompts = [_numbers(ours.model)]
    for text in PROMPTS:
        if tokenizer is None or words is None:
            continue
        ids = tokenizer.tokenize(text)
        if (got := words(text, add_special_tokens=False)["input_ids"]) != ids:
            raise ExportError(f"the tokenizers disagree on {text!r}: {ids} here, {got} there")
        prompts.append(ids[: ours.config.size("max_position_embeddings")])
    prompts = [ids for ids in prompts if ids]
    worst = 0.0
    for difference in _differences(ours.model, theirs, prompts):
        if not difference <= TOLERANCE:  # also when it is NaN
            raise ExportError(f"the logits differ by {difference:.2e}, more than {TOLERANCE:g}")
        worst = max(worst, difference)
    return worst, sum(map(len, prompts))


def _numbers(model: GPT) -> list[int]:
    """A prompt that goes through the vocabulary from end to end, as long as the model sees and at most 256 tokens."""
    vocab = model.config.size("vocab_size")
    length = min(256, model.config.size("max_position_embeddings"))
    return [(i * max(1, vocab // length) + i * i) % vocab for i in range(length - 1)] + [vocab - 1]


def _differences(ours: GPT, theirs: Any, prompts: Sequence[Sequence[int]]) -> Iterator[float]:
    """For a GPT of each prompt; for a BERT of all in one padded batch, and of the binary head."""
    if isinstance(ours, FineTuned):
        yield from (task_difference(ours, theirs, ids) for ids in prompts)
        return
    if not isinstance(ours, Bert):
        yield from (logit_difference(ours, theirs, torch.tensor([ids])) for ids in prompts)
        return
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts])
    yield from bert_differences(ours, theirs, tokens, torch.tensor([len(ids) for ids in prompts]))


def task_difference(ours: FineTuned, theirs: Any, prompt: Sequence[int]) -> float:
    """Largest absolute difference of the logits of a task's head: on one row for each choice, padded but for the first.

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
        found, answers = theirs(**words), ours.task_logits(ours.hidden(None, batch), batch)
        if ours.config.task_head != "span":
            seen = ~padding if answers.dim() == 3 else slice(None)
            return _largest(answers[seen], found.logits[seen])
        return max(
            _largest(a[~padding], b[~padding]) for a, b in zip(answers, (found.start_logits, found.end_logits), strict=True)
        )


def _bert_batch(ours: Bert, tokens: torch.Tensor, padding: torch.Tensor) -> tuple[Batch, torch.Tensor | None]:
    """Rows with the second half of each as the second segment; and the segments, None for a model without token types."""
    places, lengths = torch.arange(tokens.shape[1]).expand_as(tokens), (~padding).sum(dim=1, keepdim=True)
    segments = ((2 * places >= lengths) & ~padding).long() if ours.config.segment_kinds else None
    documents = padding.long() if padding.any() else None
    names = torch.zeros(len(tokens), dtype=torch.int64)
    return Batch(tokens, tokens, torch.ones(tokens.shape), places, names, documents, segments=segments), segments


def bert_differences(ours: Bert, theirs: Any, tokens: torch.Tensor, lengths: torch.Tensor) -> Iterator[float]:
    """Largest absolute difference of the masked words' logits, then of the binary head's where there is one.

    tokens: `[batch, seq]`; lengths: `[batch]`, what follows is padding. The second half of each row is the second segment.
    """
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    batch, segments = _bert_batch(ours, tokens, padding)
    with torch.no_grad():
        final = ours.hidden(None, batch)
        found = theirs(input_ids=tokens, attention_mask=(~padding).long(), token_type_ids=segments)
        words = found.prediction_logits if ours.order is not None else found.logits
        yield _largest(ours.output(final).transpose(0, 1)[~padding], words[~padding])
        if ours.order is not None:
            yield _largest(ours.order_logits(final), found.seq_relationship_logits)


def logit_difference(ours: GPT, theirs: Any, tokens: torch.Tensor) -> float:
    """Largest absolute difference of the two models' logits on `[batch, seq]` token ids."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens, tokens, torch.ones(tokens.shape), positions, torch.zeros(len(tokens), dtype=torch.int64))
    with torch.no_grad():
        return _largest(ours.logits(batch).transpose(0, 1), theirs(input_ids=tokens).logits)


def _largest(here: torch.Tensor, there: torch.Tensor) -> float:
    if here.shape != there.shape:
        raise ExportError(f"the logits have shape {tuple(here.shape)} here, {tuple(there.shape)} there")
    return float((here - there).abs().max())
