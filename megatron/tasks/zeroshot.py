"""Score a language model zero-shot: WikiText-103's perplexity, LAMBADA's accuracy, the perplexity of any text.

The first two follow the paper (arXiv 1909.08053, section 5.3) and Megatron-LM, so that the figures can be compared:

- WIKITEXT103: one text file, in overlapping windows; if its path contains "wiki", it is detokenized first (`wikitext.py`).
  loss is the mean over all tokens but the first. adjusted ppl normalises it by the words of the original file:
  exp(loss x token ratio), token ratio = (tokens - 1) / (words - 1), where words are separated by single spaces.
- LAMBADA: JSON lines with a "text", whose last word is to be predicted. By default the whole text is tokenised, and only its
  last token is predicted. With strict the last word is tokenised by itself, with a space before it, and all its tokens must be
  the most probable ones.
- PERPLEXITY: every document from its beginning, in overlapping windows; its first token is only context. Word and byte
  perplexity and bits per byte follow from the mean loss per token, multiplied by tokens per word and per byte (arXiv
  2101.00027), where words are separated by white space.
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
DEFAULT_OVERLAP = 32  # Megatron-LM's
MAX_EXPONENT = 20  # Megatron-LM's: perplexities are shown as at most e^20
PROGRESS_S = 30.0


@dataclass(frozen=True)
class EvaluationTotal:
    """Sums over all windows.

    Attributes:
        loss: sum of the targets' negative log-probabilities.
        hits: number of windows all of whose targets are the most probable tokens.
        targets: number of scored tokens.
        windows: number of windows.
    """

    loss: float
    hits: int
    targets: int
    windows: int


class ZeroShotEvaluation:
    """One evaluation of a model on this rank of a mesh.

    Args:
        opened: the model.
        mesh: the mesh of the model; its data-parallel ranks share the windows.
        seq_length: tokens that the model reads at once.
        overlap: distance between the starts of two windows.
        micro_batch_size: number of windows in one forward pass.
        watch: the watchdog, to which the phases are reported.
        log: called with lines about the progress.
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

    def total(self, found: Iterator[Window]) -> EvaluationTotal:
        """Return the sums over all windows of all data-parallel ranks. Collective."""
        count = tokens = 0
        next_line = time.monotonic() + PROGRESS_S

        def each() -> Iterator[Window]:
            nonlocal count, tokens, next_line
            for window in found:
                if time.monotonic() > next_line:
                    self.log(f"scored {count} windows, {tokens} tokens")
                    next_line = time.monotonic() + PROGRESS_S
                count, tokens = count + 1, tokens + window.num_scored
                yield window

        loss = hits = 0.0
        for one in score_windows(self.opened.model, each(), self.micro_batch_size, self.mesh.dp, self.watch):
            loss, hits = loss - one.log_probability, hits + one.hit
        # Every rank counts all windows itself, so only these two are summed; in fp64, since a loss has millions of terms. [2]
        sums = torch.tensor([loss, hits], dtype=torch.float64, device=self.opened.model.device)
        loss, hits = all_reduce(sums, self.mesh.dp).tolist()
        check_finite(loss, str(self.opened.directory))
        return EvaluationTotal(loss, int(hits), tokens, count)

    def split_text(self, tokens: Sequence[int], where: str) -> Iterator[Window]:
        """Return the windows of a text; DataError for a token that the model does not have. where: names it for the message."""
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
    """Score a model, log Megatron-LM's line about it, and return the figures. Collective.

    Args:
        task: WIKITEXT103, LAMBADA or PERPLEXITY.
        opened: the model.
        mesh: the mesh of the model; its data-parallel ranks share the windows.
        files: the task's files.
        seq_length: tokens that the model reads at once.
        overlap: Megatron-LM's --overlapping-eval, see `split_windows`; default 32, at most `seq_length`. Not used by LAMBADA.
        strict: for LAMBADA, predict the whole last word.
        micro_batch_size: number of windows in one forward pass.
        watch: the watchdog, to which the phases are reported.
        log: called with lines of text on every rank; only one rank should print them.

    Returns:
        The figures as JSON values; None for a perplexity that is too large for a float.

    Raises:
        ConfigError: a size does not fit the model.
        DataError: a file is missing or not in the task's format, which is found before the model computes anything; or a text
            has tokens that the model does not have.
    """
    sources = open_sources(task, files)
    if overlap is None or task == "LAMBADA":
        overlap = min(DEFAULT_OVERLAP, seq_length)
    scoring = ZeroShotEvaluation(opened, mesh, seq_length, overlap, micro_batch_size, watch=watch, log=log)
    about = {"task": task, "files": list(files), "checkpoint": str(opened.directory), "iteration": opened.iteration}
    if task == "PERPLEXITY":
        figures, line = perplexity(scoring, sources)
    elif task == "LAMBADA":
        figures, line = lambada(scoring, *sources, strict=strict)
    else:
        figures, line = wikitext(scoring, *sources)
    line = f" validation results on {task} | {line}"
    rule = "-" * (len(line) + 1)
    for one in (rule, line, rule):
        log(one)
    return {**about, "seq_length": seq_length, **figures}


def open_sources(task: str, files: Sequence[str]) -> list[TextSource]:
    """Open the files of a task, and read them once to check them. Needs no model.

    Raises:
        ConfigError: the task is unknown, or the number of files is wrong.
        DataError: a file cannot be used.
    """
    if task not in ("WIKITEXT103", "LAMBADA", "PERPLEXITY"):
        raise ConfigError([Problem(f"`--task {task}`", "is no zero-shot task", "WIKITEXT103, LAMBADA, PERPLEXITY")])
    if task == "PERPLEXITY":
        if not files:
            legal = "texts, JSON lines, indexed datasets by their prefix"
            raise ConfigError([Problem("`--valid-data`", "is missing: PERPLEXITY has nothing to read", legal)])
        return [open_source(file) for file in files]
    if len(files) != 1:
        raise ConfigError([Problem("`--valid-data`", f"names {len(files)} files", f"one file for {task}")])
    return [TextFile(files[0], lines=task == "LAMBADA")]


def wikitext(scoring: ZeroShotEvaluation, source: TextSource) -> tuple[dict[str, Any], str]:
    """Return the figures of WIKITEXT103, and the line about them."""
    raw = read_task_text(source.file)
    words = word_count(raw)
    tokens = require_tokenizer(scoring.opened).tokenize(detokenize(raw) if "wiki" in source.file else raw)
    if min(len(tokens), words) < 2:
        raise DataError(f"{source.file}: {len(tokens)} tokens and {words} words; a perplexity needs at least two of each")
    total = scoring.total(scoring.split_text(tokens, source.file))
    # The first token has no prediction, so one is subtracted from tokens and words, as in Megatron-LM.
    loss, ratio = total.loss / total.targets, (len(tokens) - 1) / (words - 1)
    figures = {
        "overlap": scoring.overlap,
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
    shown = f"ppl: {clipped_exp(loss):.4E} | adjusted ppl: {clipped_exp(loss * ratio):.4E} | token ratio: {ratio} |"
    return figures, f"avg loss: {loss:.4E} | {shown}"


def lambada(scoring: ZeroShotEvaluation, source: TextSource, *, strict: bool) -> tuple[dict[str, Any], str]:
    """Return the figures of LAMBADA, and the line about them. A context that is too long is cut at its beginning.

    Args:
        scoring: the evaluation.
        source: JSON lines.
        strict: predict the last word, tokenised by itself, instead of the last token.
    """
    tokenizer = require_tokenizer(scoring.opened)
    found, shortened = [], 0
    for text in source.texts():
        context, word = (last_word if strict else last_token)(text, tokenizer)
        if len(word) > scoring.seq_length:
            raise DataError(f"{text.where}: the last word has {len(word)} tokens, the model sees {scoring.seq_length} at once")
        tokens = [*context, *word]
        check_vocabulary(tokens, scoring.vocabulary, text.where)
        shortened += len(tokens) > scoring.seq_length + 1
        found.append(Window(tokens[-scoring.seq_length - 1 :], len(word)))
    total, count = scoring.total(iter(found)), len(found)
    figures = {
        "strict": strict,
        "accuracy": total.hits / count,
        "correct": total.hits,
        "examples": count,
        "loss": total.loss / total.targets,
        "ppl": exp_or_none(total.loss / count),  # of a last word, or of its last token
        "targets": total.targets,
        "shortened": shortened,
    }
    shown = f"total examples: {count:.4E} | avg accuracy: {total.hits / count:.4E}"
    return figures, f"number correct: {total.hits:.4E} | {shown}"


def last_token(text: SourceText, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the context, and the target: the last token of the text."""
    tokens = tokenizer.tokenize(text.text)
    if len(tokens) < 2:
        raise DataError(f"{text.where}: the text has {len(tokens)} tokens; guessing its last one needs another before it")
    return tokens[:-1], tokens[-1:]


def last_word(text: SourceText, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the context, and the target: the last word of the text, tokenised by itself."""
    words = text.text.split()
    context: list[int] = []
    if words:
        context = tokenizer.tokenize(text.text[: text.text.rfind(words[-1])].strip())
    if not context:
        raise DataError(f"{text.where}: the text has {len(words)} words; guessing its last one needs another before it")
    return context, tokenizer.tokenize(" " + words[-1])


def perplexity(scoring: ZeroShotEvaluation, sources: Sequence[TextSource]) -> tuple[dict[str, Any], str]:
    """Return the figures of PERPLEXITY, and the line about them."""
    counts = dict.fromkeys(("documents", "documents_without_targets", "tokens", "words", "bytes"), 0)
    streams = [source.documents(scoring.opened.tokenizer) for source in sources]

    def found() -> Iterator[Window]:
        for documents in streams:
            for document in documents:
                counts["documents"] += 1
                counts["documents_without_targets"] += len(document.tokens) < 2
                counts["tokens"] += len(document.tokens)
                counts["words"] += document.words
                counts["bytes"] += document.bytes
                yield from scoring.split_text(document.tokens, document.where)

    total = scoring.total(found())
    if not total.targets:
        names = ", ".join(source.file for source in sources)
        raise DataError(f"{names}: no document has two tokens, so there is nothing to predict")
    loss = total.loss / total.targets
    figures = {
        "overlap": scoring.overlap,
        "loss": loss,
        "ppl": exp_or_none(loss),
        "targets": total.targets,
        "windows": total.windows,
    }
    figures |= counts
    line = f"avg loss: {loss:.4E} | ppl: {clipped_exp(loss):.4E} |"
    if not all(source.has_text for source in sources):  # words and bytes are known only of text
        return {**figures, "words": None, "bytes": None}, line
    in_word, in_byte = loss * counts["tokens"] / counts["words"], loss * counts["tokens"] / counts["bytes"]
    bits = in_byte / math.log(2)
    figures |= {"word_ppl": exp_or_none(in_word), "byte_ppl": exp_or_none(in_byte), "bits_per_byte": bits}
    return (
        figures,
        f"{line} word ppl: {clipped_exp(in_word):.4E} | byte ppl: {clipped_exp(in_byte):.4E} | bits per byte: {bits:.4E} |",
    )


def exp_or_none(x: float) -> float | None:
    """Return e^x; None if it is too large for a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return None


def clipped_exp(x: float) -> float:
    """Return e^x, but at most e^20, as Megatron-LM shows it."""
    return math.exp(min(MAX_EXPONENT, x))
