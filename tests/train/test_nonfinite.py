"""Values that are not finite: the event names what, where and from which samples; iterations that are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from reference import GPT2, Setting, advance, micro_batches, start_run

from megatron.cli.program import pretrain
from megatron.config.schema import OptimSettings, PrecisionConfig
from megatron.train.errors import TrainingError
from megatron.train.nonfinite import FORWARD, Finding, NonFinite, format_ranges
from megatron.train.report import StepReport
from megatron.train.state import TrainState

SGD = OptimSettings(optimizer="sgd", lr=0.1, lr_decay_style="constant")
BAD = 3  # the iteration in which something is not finite
DEEP = replace(GPT2, num_layers=4)


def test_a_nonfinite_event_is_described():
    finding = Finding(1, FORWARD, 0, 3, 5, "the output of layers.12.mlp.down", 2, (7, 8, 9, 11), ": dp 1, tp 1")
    assert str(NonFinite(finding, 2, 8, reproduced=True)) == (
        "the output of layers.12.mlp.down is not finite "
        "(layer 12, stage 2, rank 5: dp 1, tp 1, samples 7-9, 11, 2 of 8 ranks found some)"
    )
    loss = NonFinite(replace(finding, what="the loss", coordinates=""), 1, 1, reproduced=False)
    assert loss.layer is None and str(loss) == (
        "the loss is not finite (stage 2, rank 5, samples 7-9, 11); a second run of the step was finite, so suspect the device"
    )
    assert format_ranges([3]) == "3" and format_ranges([5, 4, 9, 4]) == "4-5, 9" and format_ranges([]) == ""


def steps(run, setting: Setting, count: int = BAD):
    """The last of some steps."""
    for _ in range(count):
        batches = micro_batches(setting, 127, run.state.consumed_samples, run.mesh.dp.rank, run.mesh.dp.size)
        report = run.step(batches, run.state)
        advance(run, report)
    return report


def poisoned_output(setting: Setting, module: str, victim: int):
    """The event after a module of one rank gives an infinite value, for the second micro-batch of the third step."""
    run = start_run(setting, BAD + 1)
    calls = []

    def poison(_, inputs, output):
        calls.append(0)
        micro_batch = (len(calls) - 1) % per_step
        # The first run of the step, then the second.
        if len(calls) > (BAD - 1) * per_step and micro_batch == 1:
            output = output.clone()
            output.view(-1)[0] = torch.inf
        return output

    per_step = setting.global_batch // setting.micro_batch // run.mesh.dp.size
    for stage in run.stages.values():
        for name, held in stage.named_modules():
            if name == module and run.mesh.rank == victim:
                held.register_forward_hook(poison)
    report = steps(run, setting)
    return report.nonfinite, report.skipped


OUTPUTS = [  # layout, module, the rank it is poisoned on, layer, stage, samples: 4 a step, the third step has 8-11
    (1, dict(), "layers.2.mlp.down", 0, 2, 0, (9,)),
    (2, dict(), "layers.0.attention.qkv", 1, 0, 0, (11,)),  # dp rank 1 has samples 9 and 11
    (2, dict(tp=2), "layers.1.attention.dense", 1, 1, 0, (9,)),
    (2, dict(pp=2, schedule="1f1b"), "layers.3.mlp_norm", 1, 3, 1, (9,)),
    (2, dict(pp=2, schedule="zb-h1"), "layers.1.mlp.up", 0, 1, 0, (9,)),
    (2, dict(pp=2, schedule="interleaved", per_virtual_stage=1), "layers.2.mlp", 0, 2, 2, (9,)),
]


@pytest.mark.parametrize(("world", "layout", "module", "victim", "layer", "stage", "samples"), OUTPUTS)
def test_the_module_the_rank_and_the_sample_are_found(world, layout, module, victim, layer, stage, samples):
    setting = Setting(DEEP, optim=SGD, **layout)
    arguments = (setting, module, victim)
    for event, skipped in on_ranks(world, poisoned_output, *arguments) if world > 1 else [poisoned_output(*arguments)]:
        assert skipped and event.reproduced
        first = event.first
        assert (first.what, first.rank, event.layer, first.stage, first.samples) == (
            f"the output of {module}", victim, layer, stage, samples,
        )  # fmt: skip


def poisoned_gradient(setting: Setting, name: str, victim: int, *, lasting: bool):
    """The event after a gradient of one rank overflows in the second micro-batch of the third step."""
    run = start_run(setting, BAD + 1)
    spoilt = []

    def poison(_, output):
        if run.state.iteration + 1 == BAD and run.mesh.rank == victim and (lasting or not spoilt):
            spoilt.append(0)
            if not lasting or len(spoilt) in (1, 3):  # the step, its first micro-batch again, its second one again
                parameter = {s.spec.name: s for stage in run.stages.values() for s in stage.parameters()}[name]
                parameter.main_grad.view(-1)[0] = torch.nan
        return output

    step = run.pipeline.step
    run.pipeline.step = lambda batches: poison(batches, step(batches))
    return steps(run, setting).nonfinite


@pytest.mark.parametrize(
    ("layout", "name", "victim", "stage"),
    [
        (dict(micro_batch=1), "layers.2.mlp.up.weight", 1, 0),
        (dict(pp=2, micro_batch=2), "layers.3.input_norm.weight", 1, 1),
        (dict(tp=2, micro_batch=2), "layers.0.mlp.up.bias", 1, 0),
    ],
)
def test_a_gradient_is_found_by_its_parameter(layout, name, victim, stage):
    setting = Setting(DEEP, optim=SGD, **layout)
    samples = (11,) if victim and "pp" not in layout and "tp" not in layout else (10, 11)
    for event in on_ranks(2, lasting_gradient, setting, name, victim):
        assert event.reproduced and event.first.what == f"the gradient of {name}"
        assert (event.first.rank, event.first.stage, event.first.samples, event.ranks) == (victim, stage, samples, 1)


def lasting_gradient(*args):
    return poisoned_gradient(*args, lasting=True)


def first_overflow(setting: Setting):
    return steps(start_run(setting, 2), setting, 1).nonfinite


def test_of_several_stages_the_one_that_goes_back_first_is_named():
    """Megatron-LM's first loss scale overflows in many gradients; a pipeline names the one that one process names."""
    setting = Setting(replace(DEEP, untie_embeddings_and_output_weights=True), precision=PrecisionConfig(fp16=True))
    alone = first_overflow(setting)
    assert alone.reproduced and alone.first.what.startswith("the gradient of ")
    for event in on_ranks(2, first_overflow, replace(setting, pp=2)):
        assert (event.first.what, event.first.samples) == (alone.first.what, alone.first.samples)
        assert (event.first.stage, event.first.rank, event.ranks) == (1, 1, 2)


def test_the_second_run_weighs_each_micro_batch_as_the_first_did():
    setting = Setting(DEEP, precision=PrecisionConfig(fp16=True))
    run = start_run(setting, 2)
    scaled_loss, weights = run.pipeline.scaled_loss, []

    def counting(loss, micro_batches):
        weights.append(micro_batches)
        return scaled_loss(loss, micro_batches)

    run.pipeline.scaled_loss = counting
    assert steps(run, setting, 1).skipped
    assert weights == [4] * 8 and run.pipeline.scaled_loss is counting
    assert all(not p.main_grad.any() for p in run.stages[0].parameters())


def passing_gradient(*args):
    return poisoned_gradient(*args, lasting=False)


def test_a_fault_of_the_moment_is_told_as_such():
    for event in on_ranks(2, passing_gradient, Setting(DEEP, optim=SGD, pp=2), "layers.3.mlp.up.weight", 1):
        assert not event.reproduced and event.first.what == "the gradient of layers.3.mlp.up.weight"
        assert (event.first.rank, event.first.samples) == (1, (8, 9, 10, 11)) and "suspect the device" in str(event)


def lone_loss(setting: Setting):
    """The event where a loss is not a number and the gradients are numbers."""
    run = start_run(setting, BAD + 1)
    step = run.pipeline.step

    def poison(batches):
        output = step(batches)
        spoil = run.state.iteration + 1 == BAD and run.mesh.rank == 1
        return replace(output, loss=output.loss + (torch.nan if spoil else 0.0))

    run.pipeline.step = poison
    report = steps(run, setting)
    return report.skipped, report.nan, report.nonfinite


def test_a_loss_that_is_not_finite_is_told_with_its_samples():
    for skipped, nan, event in on_ranks(2, lone_loss, Setting(DEEP, optim=SGD)):
        assert not skipped and nan
        assert str(event) == "the loss is not finite (stage 0, rank 1: dp 1, samples 9, 11, 1 of 2 ranks found some)"


def test_messages_name_the_event():
    for optim, message in (
        (replace(SGD, on_nonfinite="abort"), "--on-nonfinite abort stops here"),
        (replace(SGD, max_consecutive_skips=1), "--max-consecutive-skips stops here"),
    ):
        with pytest.raises(TrainingError) as stop:
            poisoned_output(Setting(DEEP, optim=optim), "layers.1.mlp", 0)
        assert message in str(stop.value)
        assert "iteration 3: the gradient is not finite (norm nan, loss nan): the output of layers.1.mlp is not" in str(
            stop.value
        )


# The program.


def program(flags) -> int:
    return pretrain([*map(str, flags)], program="pretrain_gpt.py", defaults={"tokenizer.tokenizer_type": "ByteTokenizer"})


def training(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "split" not in line]


def test_iterations_that_are_left_out_pass_their_samples_over(flags, tmp_path, capsys):
    """At a rate that changes no loss, a step's loss says which samples it had."""
    still = [*flags, "--lr", "1e-12"]
    assert program([*still, "--skip-train-iterations", "3", "6-7", "--max-consecutive-skips", "1"]) == 0
    out = capsys.readouterr().out
    assert program([*still, "--save", tmp_path / "plain"]) == 0
    lines, plain = training(tmp_path / "run"), training(tmp_path / "plain")
    assert [line["consumed_samples"] for line in lines] == [4 * n for n in range(1, 13)]
    for number, (line, other) in enumerate(zip(lines, plain, strict=True), 1):
        left_out = number in (3, 6, 7)
        assert left_out == bool(line["skipped_iterations"]) == (line["lm_loss"] is None) == (line["grad_norm"] is None)
        assert left_out == (f"iteration {number}: left out by --skip-train-iterations; its samples are not trained on" in out)
        if left_out:  # no update, so no progress along the schedule
            assert line["learning_rate"] == lines[number - 2]["learning_rate"]
        else:
            assert line["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-6)
            assert line["lm_loss"] != pytest.approx(plain[number - 2]["lm_loss"], rel=1e-6)


def test_fp16_resumes_where_its_scale_stood(flags, tmp_path, capsys):
    half = [*flags, "--fp16", "--initial-loss-scale", "16777216", "--loss-scale-window", "3"]
    assert program([*half, "--save", tmp_path / "whole"]) == 0
    out = capsys.readouterr().out
    assert "iteration 1: skipped: the gradient of" in out and "; loss scale 1.67772e+07 from now on" in out
    assert program([*half, "--exit-interval", "8"]) == 75
    assert program([*half, "--auto-resume"]) == 0
    keys = ("iteration", "lm_loss", "grad_norm", "loss_scale", "skipped_iterations", "learning_rate")
    whole, resumed = ([{k: line[k] for k in keys} for line in training(tmp_path / name)] for name in ("whole", "run"))
    assert resumed == whole
    scales = [line["loss_scale"] for line in whole]
    assert scales[0] == 2.0**24 and len(set(scales)) > 2 and scales[7] != 2.0**24
    state = [json.loads((tmp_path / name / "iter_0000012" / "state.json").read_text()) for name in ("whole", "run")]
    assert state[0]["train"]["scaler"] == state[1]["train"]["scaler"] and state[0]["train"]["scaler"]["scale"] == scales[-1]


def test_an_infinite_loss_stays_out_of_the_averages():
    """The update was made, so the step counts; the state must still be written as JSON."""
    run = SimpleNamespace(state=TrainState(), config=SimpleNamespace(optim=OptimSettings()))
    for loss in (2.0, float("inf"), 4.0):
        advance(run, StepReport(loss, 1.0, skipped=False, nan=False, samples=1, tokens=8))
    assert (run.state.iteration, run.state.window_steps, run.state.window_loss) == (3, 2, 6.0)
    json.dumps(run.state.scalars(), allow_nan=False)
