"""MegatronBertForPreTraining with the same weights: the same logits, padded or not, and the same losses over AdamW steps."""

from __future__ import annotations

import pytest
import torch
from reference import BERT, SEQ, Setting, micro_batches, start_run, train_steps

from megatron.checkpoint.save import save
from megatron.config.command_line.saved import to_json
from megatron.config.schema import OptimSettings
from megatron.interop.hf_export import export_weights

transformers = pytest.importorskip("transformers")
STEPS, LR = 5, 3e-3
OPTIM = OptimSettings(lr=LR, lr_decay_style="constant", weight_decay=0.1, clip_grad=1.0, adam_beta2=0.95)
SETTING = Setting(BERT, optim=OPTIM, micro_batch=2)


@pytest.fixture
def both(tmp_path):
    """A fresh run, and transformers' model with its weights."""
    run = start_run(SETTING, STEPS)
    with torch.no_grad():
        for parameter in run.stages[0].parameters():  # so that no bias and no norm hides
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        run.stages[0].embedding.word.weight[127:] = 0.0
    checkpoint = save(tmp_path, 0, {"model": run.weights}, run.mesh, config=to_json(run.config))
    export_weights(checkpoint, tmp_path / "hf")
    return run, transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "hf").float().eval()  # eval: no dropout


def transformers_inputs(batch) -> dict[str, torch.Tensor]:
    """A batch in transformers' words."""
    seen = torch.ones_like(batch.tokens) if batch.documents is None else 1 - batch.documents
    return dict(input_ids=batch.tokens, attention_mask=seen, token_type_ids=batch.segments)


def test_bert_logits_equal_those_of_transformers(both):
    run, theirs = both
    model = run.stages[0].eval()
    lengths = set()
    for batch in micro_batches(SETTING, 127, 0, 0, 1):
        words = transformers_inputs(batch)
        lengths |= set(words["attention_mask"].sum(1).tolist())
        with torch.no_grad():
            final, expected = model.hidden(None, batch), theirs(**words)
        seen = words["attention_mask"].bool()
        assert (model.logits(final).transpose(0, 1) - expected.prediction_logits)[seen].abs().max() < 1e-4
        assert (model.order_logits(final) - expected.seq_relationship_logits).abs().max() < 1e-4
        unmasked = theirs(**{**words, "attention_mask": torch.ones_like(batch.tokens)})
        if not seen.all():  # what padding would do
            assert (model.logits(final).transpose(0, 1) - unmasked.prediction_logits)[seen].abs().max() > 1e-2
    assert len(lengths) > 2 and SEQ in lengths


def their_losses(model) -> list[tuple[float, float]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, curve = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8), []
    for step in range(STEPS):
        batches = micro_batches(SETTING, 127, step * SETTING.global_batch, 0, 1)
        counted = sum(float(batch.loss_mask.sum()) for batch in batches)
        total = [0.0, 0.0]
        for batch in batches:
            found = model(**transformers_inputs(batch))
            chosen = batch.loss_mask.bool()
            words = torch.nn.functional.cross_entropy(found.prediction_logits[chosen], batch.labels[chosen], reduction="sum")
            order = torch.nn.functional.cross_entropy(found.seq_relationship_logits, batch.swapped, reduction="sum")
            (words / counted + order / SETTING.global_batch).backward()
            total = [total[0] + words.item() / counted, total[1] + order.item() / SETTING.global_batch]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((total[0], total[1]))
    return curve


def test_steps_give_the_same_losses(both):
    run, theirs = both
    expected = their_losses(theirs)
    ours = [(lm, sop) for lm, _, sop in train_steps(run, SETTING, STEPS)]
    assert expected[-1][0] < expected[0][0] - 0.05
    assert max(abs(a - b) for step, want in zip(ours, expected, strict=True) for a, b in zip(step, want, strict=True)) < 1e-4
