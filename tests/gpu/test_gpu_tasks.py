"""On a GPU: a BERT is fine-tuned in every precision, a GPT scores and writes as on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from trained_gpt import sentences, train_and_export

from megatron.cli.program import run_task
from megatron.inference.generate import extend_texts
from megatron.inference.restore import open_pipeline
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText
from megatron.mesh.mesh import Mesh
from megatron.tasks.zeroshot import zero_shot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.mark.parametrize("precision", ["", "--bf16", "--fp16 --initial-loss-scale 1024"], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["MNLI", "RACE", "SQUAD", "NER"])
def test_a_pretrained_model_learns_the_task(name, precision, bert, tmp_path):
    data = ["--task", name, "--pretrained-checkpoint", bert.checkpoint, "--train-data", bert.train[name]]
    data += ["--valid-data", bert.dev[name], "--save", str(tmp_path), "--epochs", "6", "--lr", "2e-3"]
    dry = ["--lr-warmup-fraction", "0.1", "--hidden-dropout", "0", "--attention-dropout", "0", *precision.split()]
    assert run_task([*data, *dry], program="tasks/main.py", defaults={"batch.micro_batch_size": 8}) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(found[metric] > 95.0 for metric in ("accuracy", "exact_match", "f1") if metric in found), found


def score_and_generate(root, text, device: str):
    """Scores of a text, and what greedy generation makes of three prompts."""
    opened = open_pipeline(root, Mesh.single(), device=device)
    figures = zero_shot("PERPLEXITY", opened, Mesh.single(), [str(text)], seq_length=24, overlap=10, log=lambda line: None)
    texts = [GeneratedText.from_prompt(opened.tokenizer.tokenize(prompt)) for prompt in ("ma", "tun lo", "lo ma ma")]
    for _ in extend_texts(opened.model, texts, max_new_tokens=16, sampling=Sampling(temperature=0.0)):
        pass
    return figures["loss"], [text.tokens for text in texts]


def test_scores_and_greedy_texts_are_a_cpus(tmp_path):
    root, text = train_and_export(tmp_path, steps=40) / "run", tmp_path / "text.txt"
    text.write_text(". ".join(sentences(5, 3)))
    (loss, written), (expected, texts) = score_and_generate(root, text, "cuda"), score_and_generate(root, text, "cpu")
    assert loss == pytest.approx(expected, rel=1e-4) and written == texts
