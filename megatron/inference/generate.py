"""Generate text from one or several prompts at once, one token at a time, with a key-value cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron.contract import Batch
from megatron.inference.sampling import Sampling
from megatron.inference.text_batch import TextBatch, TextGroup
from megatron.inference.texts import GeneratedText, Predictor


def choose_device(name: str | None, gpus: int) -> torch.device:
    """Return the device to generate on; by default a GPU if there is one.

    Args:
        name: `cpu`, `cuda` or `cuda:N`; None for the default.
        gpus: number of GPUs of this machine.

    Raises:
        ValueError: the name is unknown, or there is no such GPU.
    """
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    if (match := re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)) is None:
        raise ValueError(f"--device {name} is not known; legal: cpu, cuda, cuda:N")
    if name != "cpu" and int(match[1] or 0) >= gpus:
        raise ValueError(f"--device {name} is not there: PyTorch finds {gpus} GPUs on this machine; --device cpu needs none")
    return torch.device(name)


def extend_texts(
    model: Predictor,
    texts: Sequence[GeneratedText],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    first: int = 0,
    stops: Callable[[GeneratedText], bool] = lambda text: False,
    banned: Callable[[int], Sequence[int]] = lambda last: (),
    top: int | None = None,
    use_cache: bool = True,
) -> Iterator[list[int]]:
    """Generate tokens until each text has ended. Collective: all ranks get the same tokens.

    Args:
        model: the model.
        texts: extended in place, up to the model's last position. ValueError for one that cannot be continued.
        max_new_tokens: maximum number of new tokens of each text.
        sampling: the rule by which tokens are chosen.
        seed: the seed; random choices follow from it and from the number of the text.
        first: number of the first text.
        stops: returns whether a text's last token ends it.
        banned: returns the tokens that must not follow a token.
        top: compute a score for every token after the first, with this many alternatives; None for no scores.
        use_cache: keep keys and values; without it every pass computes all tokens again, as a reference for tests.

    Yields:
        After every pass, the indices of the texts that grew or ended.
    """
    group = TextGroup(
        model,
        texts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        first=first,
        stops=stops,
        banned=banned,
        top=top,
        use_cache=use_cache,
    )
    batch = TextBatch(model)
    batch.add(group)
    while batch.groups:
        ((_, grown),) = batch.step()
        if group.error:
            raise ValueError(group.error)
        yield grown


def generate_tokens(
    model: Predictor,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield the new tokens of one text, one by one; see `extend_texts`.

    Args:
        model: the model.
        prompt: the tokens of the prompt.
        max_new_tokens: maximum number of new tokens.
        sampling: the rule by which tokens are chosen.
        seed: seed of the random choices.
        stop: the token that ends the text, which is not yielded.
        use_cache: keep keys and values of the tokens so far.
    """
    text = GeneratedText.from_prompt(prompt)

    def stops(text: GeneratedText) -> bool:
        return text.tokens[-1] == stop

    for grown in extend_texts(
        model, [text], max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stops=stops, use_cache=use_cache
    ):
        if text.end == "stop" or (text.end and not text.written):
            return
        if grown:
            yield text.tokens[-1]


def batch_of_rows(rows: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Return sequences of equal length, from position 0 on, as a batch for inference. device: of its tensors."""
    ids = torch.tensor([list(row) for row in rows], device=device)  # [batch, seq]
    positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)  # [batch, seq]
    samples = torch.zeros(len(rows), dtype=torch.int64, device=device)  # [batch]
    return Batch(ids, ids, torch.zeros(ids.shape, device=device), positions, samples)
