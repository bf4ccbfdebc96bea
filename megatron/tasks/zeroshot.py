"""Score a language model zero-shot: WikiText-103's perplexity, LAMBADA's accuracy, the perplexity of any text.

The first two follow the paper (arXiv 1909.08053, section 5.3) and Megatron-LM, so that results can be compared:

- WIKITEXT103: one text file, in overlapping windows; if its path contains "wiki", it is detokenized first (`wikitext.py`).
  The loss is the mean over all tokens but the first. The adjusted perplexity is normalized by the words of the original file,
  which makes different vocabularies comparable: exp(loss x token ratio), token ratio = (tokens - 1) / (words - 1), where words
  are separated by single spaces.
- LAMBADA: JSON lines with a "text", whose last word is to be predicted. By default the whole text is tokenized, and only its
  last token is predicted. With --strict-lambada the last word is tokenized by itself, with a space before it, and each of its
  tokens must be the most probable one.
- PERPLEXITY: every document, in overlapping windows; its first token is only context. Perplexity per word and per byte and
  bits per byte follow from the mean loss per token, multiplied by tokens per word and per byte (arXiv 2101.00027). Words are
  separated by white space.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.config.errors import ConfigError, Problem
from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.inference.pipeline import Pipeline
from megatron.inference.restore import OpenedModel
from megatron.launch.watchdog import Watchdog
from megatron.mesh.mesh import Mesh
from megatron.parallel.collectives import all_reduce
from megatron.tasks.reading import read_task_text
from megatron.tasks.scoring import check_finite, check_scoring_sizes, check_vocabulary, require_tokenizer, score_windows
from megatron.tasks.sources import SourceText, TextFile, TextSource, open_source
from megatron.tasks.wikitext import detokenize, word_count
from megatron.tasks.windows import Window, split_windows

Log = Callable[[str], object]
DEFAULT_OVERLAP = 32  # Megatron-LM's default
MAX_EXPONENT = 20  # Megatron-LM prints larger perplexities as e^20
PROGRESS_SECONDS = 30.0  # time between two lines about the progress


@dataclass(frozen=True)
class EvaluationTotal:
    """Sums over all windows.

    Attributes:
        loss: sum of the scored tokens' negative log-probabilities.
        hits: number of windows in which every scored token is the most probable one.
        targets: number of scored tokens.
        windows: number of windows.
    """

    loss: float
    hits: int
    targets: int
    windows: int


class ZeroShotEvaluation:
    """One evaluation of a model, as this rank takes part in it.

    Args:
        opened: the model.
        mesh: the mesh of the model; the windows are divided among its data-parallel ranks.
        seq_length: tokens that the model reads at once.
        overlap: distance between the starts of two windows.
        micro_batch_size: number of windows in one forward pass.
        watch: the watchdog, to which the phases are reported; None reports nothing.
        log: called on every rank with lines about the progress.
    """

    def __init__(
        self,
        opened: OpenedModel[Pipeline],
        mesh: Mesh,
        seq_length: int,
        overlap: int,
        micro_batch_size: int,
        *,
        watch: Watchdog | None = None,
        log: Log = print,
    ) -> None:
        check_scoring_sizes(opened, seq_length, overlap, micro_batch_size)
        self.opened, self.mesh, self.watch, self.log = opened, mesh, watch, log
        self.seq_length, self.overlap, self.micro_batch_size = seq_length, overlap, micro_batch_size
        self.vocabulary = opened.config.known_vocab_size

    def total(self, windows: Iterator[Window]) -> EvaluationTotal:
        """Score windows, the same on all ranks, and return the sums over all of them. Collective."""
        count = targets = 0
        next_log = time.monotonic() + PROGRESS_SECONDS

        def count_windows() -> Iterator[Window]:
            nonlocal count, targets, next_log
            for window in windows:
                if time.monotonic() > next_log:
                    self.log(f"scored {count} windows, {targets} tokens")
                    next_log = time.monotonic() + PROGRESS_SECONDS
                count, targets = count + 1, targets + window.num_scored
                yield window

        loss = hits = 0.0
        for score in score_windows(self.opened.model, count_windows(), self.micro_batch_size, self.mesh.dp, self.watch):
            loss, hits = loss - score.log_probability, hits + score.hit
        # Only these two sums are over this rank's share of the windows. In fp64, since the loss may have millions of terms. [2]
        sums = torch.tensor([loss, hits], dtype=torch.float64, device=self.opened.model.device)
        loss, hits = all_reduce(sums, self.mesh.dp).tolist()
        check_finite(loss, str(self.opened.directory))
        return EvaluationTotal(loss, int(hits), targets, count)

    def split_text(self, tokens: Sequence[int], where: str) -> Iterator[Window]:
        """Return the windows of a text; DataError, which names its place `where`, for a token outside the vocabulary."""
        check_vocabulary(tokens, self.vocabulary, where)
        return split_windows(tokens, self.seq_length, self.overlap)


def zero_shot(
    task: str,
    opened: OpenedModel[Pipeline],
    mesh: Mesh,
    files: Sequence[str],
    *,
    seq_length: int,
    overlap: int | None = None,
    strict: bool = False,
    micro_batch_size: int = 4,
    watch: Watchdog | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Score a model, log the result in Megatron-LM's format, and return the figures. Collective.

    Args:
        task: WIKITEXT103, LAMBADA or PERPLEXITY.
        opened: the model.
        mesh: the mesh of the model; the windows are divided among its data-parallel ranks.
        files: names of the task's files.
        seq_length: tokens that the model reads at once.
        overlap: Megatron-LM's --overlapping-eval, see `split_windows`; default 32, at most `seq_length`; LAMBADA ignores it.
        strict: with LAMBADA, predict the whole last word.
        micro_batch_size: number of windows in one forward pass.
        watch: the watchdog, to which the phases are reported; None reports nothing.
        log: called with lines of text on every rank; only one rank should print them.

    Returns:
        The figures as JSON values; a perplexity that is too large for a float is None.

    Raises:
        ConfigError: a size does not fit the model.
        DataError: a file is missing or not in the task's format, which is found before the model is used; or a text has tokens
            outside the model's vocabulary.
    """
    sources = open_sources(task, files)
    if overlap is None or task == "LAMBADA":
        overlap = min(DEFAULT_OVERLAP, seq_length)
    evaluation = ZeroShotEvaluation(opened, mesh, seq_length, overlap, micro_batch_size, watch=watch, log=log)
    header = {"task": task, "files": list(files), "checkpoint": str(opened.directory), "iteration": opened.iteration}
    if task == "PERPLEXITY":
        figures, line = perplexity(evaluation, sources)
    elif task == "LAMBADA":
        figures, line = lambada(evaluation, *sources, strict=strict)
    else:
        figures, line = wikitext(evaluation, *sources)
    line = f" validation results on {task} | {line}"
    ruler = "-" * (len(line) + 1)
    for text in (ruler, line, ruler):
        log(text)
    return {**header, "seq_length": seq_length, **figures}


def open_sources(task: str, files: Sequence[str]) -> list[TextSource]:
    """Open the files of a task, and read them once to check them; no model is needed.

    Raises:
        ConfigError: the task is unknown, or the number of files is wrong.
        DataError: a file cannot be used.
    """
    if task not in ("WIKITEXT103", "LAMBADA", "PERPLEXITY"):
        raise ConfigError([Problem(f"`--task {task}`", "is not a zero-shot task", "WIKITEXT103, LAMBADA, PERPLEXITY")])
    if task == "PERPLEXITY":
        if not files:
            legal = "text files, JSON lines, prefixes of indexed datasets"
            raise ConfigError([Problem("`--valid-data`", "is missing: PERPLEXITY needs files to score", legal)])
        return [open_source(file) for file in files]
    if len(files) != 1:
        raise ConfigError([Problem("`--valid-data`", f"names {len(files)} files", f"one file for {task}")])
    return [TextFile(files[0], lines=task == "LAMBADA")]


def wikitext(evaluation: ZeroShotEvaluation, source: TextSource) -> tuple[dict[str, Any], str]:
    """Return the figures of WIKITEXT103, and the line about them."""
    raw = read_task_text(source.file)
    words = word_count(raw)
    tokens = require_tokenizer(evaluation.opened).tokenize(detokenize(raw) if "wiki" in source.file else raw)
    if min(len(tokens), words) < 2:
        raise DataError(f"{source.file}: {len(tokens)} tokens and {words} words; a perplexity needs at least two of each")
    total = evaluation.total(evaluation.split_text(tokens, source.file))
    # The first token has no prediction, so one is subtracted from tokens and words, as in Megatron-LM.
    loss, ratio = total.loss / total.targets, (len(tokens) - 1) / (words - 1)
    figures = {
        "overlap": evaluation.overlap,
        "loss": loss,
        "ppl": exp_or_none(loss),
        "adjusted_ppl": exp_or_none(loss * ratio),
        "ppl_clipped": clipped_exp(loss),
        "adjusted_ppl_clipped": clipped_exp(loss * ratio),
        "token_ratio": ratio,
        "tokens": len(tokens),
        "words": words,
        "targets": total.targets,
        "windows": total.windows,
    }
    perplexities = f"ppl: {clipped_exp(loss):.4E} | adjusted ppl: {clipped_exp(loss * ratio):.4E} | token ratio: {ratio} |"
    return figures, f"avg loss: {loss:.4E} | {perplexities}"


def lambada(evaluation: ZeroShotEvaluation, source: TextSource, *, strict: bool) -> tuple[dict[str, Any], str]:
    """Return the figures of LAMBADA, and the line about them. A context that is too long loses its beginning.

    Args:
        evaluation: the model and the sizes.
        source: JSON lines, each with a text.
        strict: predict the last word, tokenized by itself, instead of the last token.
    """
    tokenizer = require_tokenizer(evaluation.opened)
    windows, shortened = [], 0
    for text in source.texts():
        context, target = (last_word if strict else last_token)(text, tokenizer)
        if len(target) > evaluation.seq_length:
            limit = f"more than the {evaluation.seq_length} that the model reads at once"
            raise DataError(f"{text.where}: the last word has {len(target)} tokens, {limit}")
        tokens = [*context, *target]
        check_vocabulary(tokens, evaluation.vocabulary, text.where)
        shortened += len(tokens) > evaluation.seq_length + 1
        windows.append(Window(tokens[-evaluation.seq_length - 1 :], len(target)))
    total, count = evaluation.total(iter(windows)), len(windows)
    figures = {
        "strict": strict,
        "accuracy": total.hits / count,
        "correct": total.hits,
        "examples": count,
        "loss": total.loss / total.targets,
        "ppl": exp_or_none(total.loss / count),  # perplexity of a whole target: the last word, or the last token
        "targets": total.targets,
        "shortened": shortened,
    }
    accuracy = total.hits / count
    line = f"number correct: {total.hits:.4E} | total examples: {count:.4E} | avg accuracy: {accuracy:.4E}"
    return figures, line


def last_token(text: SourceText, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return a text's context and target; the target is its last token."""
    tokens = tokenizer.tokenize(text.text)
    if len(tokens) < 2:
        raise DataError(f"{text.where}: the text has {len(tokens)} tokens; predicting the last one needs another before it")
    return tokens[:-1], tokens[-1:]


def last_word(text: SourceText, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return a text's context and target; the target is its last word, tokenized by itself."""
    words = text.text.split()
    context: list[int] = []
    if words:
        context = tokenizer.tokenize(text.text[: text.text.rfind(words[-1])].strip())
    if not context:
        raise DataError(f"{text.where}: the text has {len(words)} words; predicting the last one needs another before it")
    return context, tokenizer.tokenize(" " + words[-1])


def perplexity(evaluation: ZeroShotEvaluation, sources: Sequence[TextSource]) -> tuple[dict[str, Any], str]:
    """Return the figures of PERPLEXITY, and the line about them."""
    counts = dict.fromkeys(("documents", "documents_without_targets", "tokens", "words", "bytes"), 0)
    documents_by_source = [source.documents(evaluation.opened.tokenizer) for source in sources]

    def count_documents() -> Iterator[Window]:
        for documents in documents_by_source:
            for document in documents:
                counts["documents"] += 1
                counts["documents_without_targets"] += len(document.tokens) < 2
                counts["tokens"] += len(document.tokens)
                counts["words"] += document.words
                counts["bytes"] += document.bytes
                yield from evaluation.split_text(document.tokens, document.where)

    total = evaluation.total(count_documents())
    if not total.targets:
        names = ", ".join(source.file for source in sources)
        raise DataError(f"{names}: no document has two tokens, so there is nothing to predict")
    loss = total.loss / total.targets
    figures = {
        "overlap": evaluation.overlap,
        "loss": loss,
        "ppl": exp_or_none(loss),
        "targets": total.targets,
        "windows": total.windows,
    }
    figures |= counts
    line = f"avg loss: {loss:.4E} | ppl: {clipped_exp(loss):.4E} |"
    if not all(source.has_text for source in sources):  # the words and bytes of an indexed dataset are not known
        return {**figures, "words": None, "bytes": None}, line
    word_loss, byte_loss = loss * counts["tokens"] / counts["words"], loss * counts["tokens"] / counts["bytes"]
    bits_per_byte = byte_loss / math.log(2)
    figures |= {"word_ppl": exp_or_none(word_loss), "byte_ppl": exp_or_none(byte_loss), "bits_per_byte": bits_per_byte}
    per_word_and_byte = f"word ppl: {clipped_exp(word_loss):.4E} | byte ppl: {clipped_exp(byte_loss):.4E}"
    return figures, f"{line} {per_word_and_byte} | bits per byte: {bits_per_byte:.4E} |"


def exp_or_none(x: float) -> float | None:
    """Return e^x; None if it is too large for a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return None


def clipped_exp(x: float) -> float:
    """Return e^x, but at most e^20, as Megatron-LM prints it."""
    return math.exp(min(MAX_EXPONENT, x))
