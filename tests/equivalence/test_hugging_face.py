"""Training steps equal those of Hugging Face's models with the same weights, batches and torch's AdamW."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import GPT2, LLAMA, Setting, micro_batches, start_run, train_steps

from megatron.checkpoint.save import save
from megatron.config.command_line.saved import to_json
from megatron.config.schema import OptimSettings
from megatron.interop.hf_export import export_weights

transformers = pytest.importorskip("transformers")
STEPS, LR = 4, 3e-3
OPTIM = OptimSettings(lr=LR, lr_decay_style="constant", weight_decay=0.1, clip_grad=1.0, adam_beta2=0.95)


def their_losses(directory, setting: Setting) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).float().eval()  # eval: no dropout
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for batch in micro_batches(setting, 127, step * setting.global_batch, 0, 1):
            logits = model(batch.tokens).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
            (loss / (setting.global_batch * batch.tokens.shape[1])).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / (setting.global_batch * batch.tokens.shape[1]))
    return losses


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_steps_give_the_same_losses(model, tmp_path):
    setting = Setting(model, optim=OPTIM, micro_batch=2)
    run = start_run(setting, STEPS)
    checkpoint = save(tmp_path, 0, {"model": run.weights}, run.mesh, config=to_json(run.config))
    export_weights(checkpoint, tmp_path / "hf")
    expected = their_losses(tmp_path / "hf", setting)
    ours = [loss for loss, _ in train_steps(run, setting, STEPS)]
    assert expected[-1] < expected[0] - 0.05
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-4
