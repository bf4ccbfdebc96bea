"""The program as a user runs it, in one process: what it writes, how it resumes, how it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron.cli.program import pretrain
from megatron.launch.heartbeat import Process
from megatron.train.ending import Exit
from megatron.train.lock import LockHolder

ROOT = Path(__file__).parents[2]
DEFAULTS = {"tokenizer.tokenizer_type": "GPT2BPETokenizer"}
KEYS = {
    "iteration", "lm_loss", "grad_norm", "learning_rate", "loss_scale", "skipped_iterations", "nan_iterations",
    "consumed_samples", "consumed_tokens", "iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "mfu_causal",
    "peak_memory_bytes",
}  # fmt: skip
LINE = re.compile(
    r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| learning rate: [\d.E+-]+ \| global batch size: +(\d+) \| "
    r"lm loss: ([\d.E+-]+) \| loss scale: 1\.0 \| grad norm: [\d.]+ \| number of skipped iterations: +0 \| "
    r"number of nan iterations: +0 \| tokens per second: [\d.]+ \| throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \| "
    r"ETA: \d:\d\d:\d\d \|$"
)


def run(flags) -> int:
    return pretrain([*map(str, flags)], program="pretrain_gpt.py", defaults=DEFAULTS)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    times = ("iteration_time_ms", "tokens_per_second", "tflops_per_gpu", "mfu", "mfu_causal")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "shard_00000.safetensors")


def test_flags_of_todays_and_old_scripts_train_as_ours_do(flags, tmp_path, capsys):
    """The notes are true: flags without effect change no loss, and old names mean what the new ones do."""
    short = ["--train-iters", 2, "--lr-warmup-iters", 1, "--eval-iters", 0]
    short += ["--position-embedding-type", "rope", "--num-query-groups", 1]
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
    assert run([*flags, *short, *full, "--save", tmp_path / "ours"]) == Exit.FINISHED
    theirs = (
        "--use-mcore-models --transformer-impl transformer_engine --attention-backend unfused --deterministic-mode "
        "--ckpt-format torch_dist --dist-ckpt-strictness log_all --ckpt-fully-parallel-load --manual-gc --no-mmap-bin-files "
        "--no-create-attention-mask-in-dataloader --cross-entropy-loss-fusion --tp-comm-overlap --te-rng-tracker "
        "--async-strategy mcore --rerun-mode validate_results --cp-comm-type p2p --DDP-impl local --timing-log-level 2 "
        "--no-position-embedding --group-query-attention --checkpoint-activations --use-precision-aware-optimizer"
    )
    batch = flags.index("--micro-batch-size")
    old = [*flags[:batch], "--batch-size", *flags[batch + 1 :], "--split", "'80,10,10'"]
    capsys.readouterr()
    assert run([*old, *short, *theirs.split(), "--save", tmp_path / "theirs"]) == Exit.FINISHED
    notes = capsys.readouterr().out
    assert notes.count(" changes nothing: ") == 19 and notes.count(" is read as ") == 2
    assert without_times(metrics(tmp_path / "ours")) == without_times(metrics(tmp_path / "theirs"))


def test_a_run_writes_what_the_contract_says(flags, tmp_path, capsys):
    assert run([*flags, "--tensorboard-dir", tmp_path / "tb"]) == Exit.FINISHED
    out = capsys.readouterr().out
    lines = [match for match in map(LINE.match, out.splitlines()) if match]
    assert [int(m[1]) for m in lines] == list(range(1, 13))
    assert out.startswith("starting fresh")
    title = r"-+\n validation loss at iteration 5 \| lm loss value: ([\d.E+]+) \| lm loss PPL: [\d.E+]+ \| \n-+\n"
    assert re.search(title, out)
    written = metrics(tmp_path / "run")
    training = [line for line in written if "split" not in line]
    assert all(set(line) == KEYS for line in training)
    assert training[-1]["lm_loss"] < 0.8 * training[0]["lm_loss"]
    assert training[-1]["consumed_samples"] == 48 and training[-1]["consumed_tokens"] == 48 * 32
    assert [f"{line['lm_loss']:.6E}" for line in training] == [m[5] for m in lines]
    held_out = [line for line in written if "split" in line]
    assert [(line["iteration"], line["split"]) for line in held_out] == [
        (5, "validation"), (10, "validation"), (12, "validation"), (12, "test"),
    ]  # fmt: skip
    assert all(set(line) == {"iteration", "split", "lm_loss", "ppl"} for line in held_out)
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "12"
    assert list((tmp_path / "tb").iterdir())


def test_tensorboard_has_megatrons_tags(flags, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    extra = ["--log-validation-ppl-to-tensorboard", "--log-params-norm", "--log-num-zeros-in-grad"]
    assert run([*flags, "--tensorboard-dir", tmp_path / "tb", *extra]) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = {"lm loss", "learning-rate", "loss-scale", "grad-norm", "params-norm", "num-zeros", "lm loss validation"}
    tags |= {f"{tag} vs samples" for tag in tags} | {"iteration-time", "lm loss validation ppl"}
    assert tags <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("lm loss")] == list(range(1, 13))


@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_is_the_uninterrupted_run(flags, tmp_path, stop):
    assert run(flags) == Exit.FINISHED
    whole = tmp_path / "run"
    split = [flag if flag != str(whole) else str(tmp_path / "split") for flag in flags]
    assert run([*split, "--auto-resume", "--log-interval", "3", "--exit-interval", stop]) == Exit.STOPPED
    assert run([*split, "--auto-resume", "--log-interval", "3"]) == Exit.FINISHED
    final, expected = tensors(tmp_path / "split" / "iter_0000012"), tensors(whole / "iter_0000012")
    assert set(final) == set(expected) and all(torch.equal(final[name], expected[name]) for name in final)
    resumed = [line for line in without_times(metrics(tmp_path / "split")) if "split" not in line]
    assert [line["iteration"] for line in resumed] == [3, 6, 9, 12]
    uninterrupted = {line["iteration"]: line for line in without_times(metrics(whole)) if "split" not in line}
    for line in resumed:
        window = [uninterrupted[i]["lm_loss"] for i in range(line["iteration"] - 2, line["iteration"] + 1)]
        assert line.pop("lm_loss") == pytest.approx(sum(window) / 3, rel=1e-12)
        expected_line = dict(uninterrupted[line["iteration"]])
        del expected_line["lm_loss"]
        assert line == expected_line
    evaluations = [line for line in metrics(tmp_path / "split") if "split" in line]
    assert evaluations == [line for line in metrics(whole) if "split" in line]


def test_loading_weights_only(flags, tmp_path, capsys):
    assert run(flags) == 0
    tuned = [flag if flag != str(tmp_path / "run") else str(tmp_path / "tuned") for flag in flags]
    assert run([*tuned, "--load", tmp_path / "run", "--finetune", "--lr", "1e-30"]) == 0
    assert "weights only" in capsys.readouterr().out
    old, new = tensors(tmp_path / "run" / "iter_0000012"), tensors(tmp_path / "tuned" / "iter_0000012")
    for name, values in new.items():
        if name.startswith("model."):
            torch.testing.assert_close(values, old[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(old["optimizer.exp_avg.final_norm.weight"], new["optimizer.exp_avg.final_norm.weight"])


def test_the_schedule_of_a_resumed_run(flags, tmp_path, capsys):
    """If it differs, the command says which one counts; that is done, and said."""
    assert run([*flags, "--exit-interval", "4"]) == Exit.STOPPED
    root = ["--load", str(tmp_path / "run")]

    def rate(extra: str) -> float:
        here = [flag if flag != str(tmp_path / "run") else str(tmp_path / extra) for flag in flags]
        changed = ["--train-iters", "6", "--lr-decay-iters", "12", "--lr", "5e-3", "--weight-decay", "0.1"]
        assert run([*here, *root, *changed]) == 2
        error = capsys.readouterr().err
        assert "`--lr` is 0.005; the schedule of " in error and "iter_0000004 has 0.01; legal: --override-opt_param" in error
        assert (
            "--use-checkpoint-opt_param-scheduler keeps that of the checkpoint" in error and "`--weight-decay` is 0.1" in error
        )
        assert error.count("error: ") == 2 and not (tmp_path / extra).exists()
        assert run([*here, *root, *changed, extra]) == 0
        lines = [line for line in metrics(tmp_path / extra) if line["iteration"] == 5 and "split" not in line]
        return lines[-1]["learning_rate"]

    assert rate("--use-checkpoint-opt_param-scheduler") == pytest.approx(1e-2 * (1 - (5 - 2) / 10))
    said = capsys.readouterr().out
    assert re.search(r"^  schedule, peak +0\.01 +0\.005 +the checkpoint's$", said, re.MULTILINE)
    assert re.search(r"^  schedule, decay_weights_to +0\.01 +0\.1 +the checkpoint's$", said, re.MULTILINE)
    assert "optim.weight_decay" not in said, "one setting, one winner"
    assert rate("--override-opt_param-scheduler") == pytest.approx(5e-3 * (1 - (5 - 2) / 10))
    assert re.search(r"^  schedule, peak +0\.01 +0\.005 +this run's$", capsys.readouterr().out, re.MULTILINE)


def test_the_schedule_outlives_a_second_resume(flags, tmp_path):
    """The checkpoints of a resumed run hold the schedule that was followed, not the one that was typed."""
    longer = [*flags, "--auto-resume", "--train-iters", "24", "--use-checkpoint-opt_param-scheduler"]
    assert run([*flags, "--exit-interval", "4"]) == Exit.STOPPED
    assert run([*longer, "--exit-interval", "8"]) == Exit.STOPPED
    assert run(longer) == Exit.FINISHED
    rates = {line["iteration"]: line["learning_rate"] for line in metrics(tmp_path / "run") if "split" not in line}
    assert [rates[i] for i in (6, 8, 10)] == pytest.approx([6e-3, 4e-3, 2e-3]) and rates[20] == 0.0


def test_a_resume_by_another_spelling_of_the_directory_drops_the_same_lines(flags, tmp_path, monkeypatch):
    """Lines that the interrupted run wrote beyond its checkpoint stand there once, however --load spells --save."""
    assert run([*flags, "--exit-interval", "8"]) == Exit.STOPPED
    monkeypatch.chdir(tmp_path)
    assert run([*flags, "--load", "./run", "--load-iteration", "4"]) == Exit.FINISHED
    steps = [line["iteration"] for line in metrics(tmp_path / "run") if "split" not in line]
    assert steps == list(range(1, 13))


def test_metrics_are_appended_and_a_finished_run_stays_finished(flags, tmp_path, capsys):
    assert run(flags) == 0
    before = metrics(tmp_path / "run")
    assert run([*flags, "--auto-resume"]) == 0
    assert "nothing is left to train" in capsys.readouterr().out and metrics(tmp_path / "run") == before
    assert run([*flags, "--train-iters", "3"]) == 2 and metrics(tmp_path / "run") == before
    assert "--auto-resume resumes from them; --overwrite replaces them" in capsys.readouterr().err
    assert run([*flags, "--train-iters", "3", "--overwrite"]) == 0
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.1.jsonl").read_text().splitlines()] == before
    assert [line["iteration"] for line in metrics(tmp_path / "run") if "split" not in line] == [1, 2, 3]


def test_every_evaluation_sees_the_same_samples(flags, tmp_path):
    still = [*flags, "--lr", "1e-30", "--eval-interval", "4"]
    assert run(still) == 0
    losses = [line["lm_loss"] for line in metrics(tmp_path / "run") if line.get("split") == "validation"]
    assert len(losses) == 3 and max(losses) - min(losses) < 1e-5
    assert run([*still, "--skip-train", "--load", tmp_path / "run"]) == 0
    assert metrics(tmp_path / "run")[-2]["lm_loss"] == pytest.approx(losses[0], abs=1e-5)


def test_an_evaluation_leaves_the_run_alone_in_whose_directory_it_is(flags, tmp_path):
    """Also the one that is at work there: its lock, its metrics, its note of how far it came, and a request to stop it."""
    folder, short = tmp_path / "run", [*flags, "--train-iters", 4, "--save-interval", 2]
    assert run(short) == 0
    before, note = metrics(folder), (folder / "progress.json").read_text()
    holder = LockHolder("now", (Process.here(os.getppid()),))
    (folder / ".lock").write_text(holder.to_text())
    (folder / "stop").touch()
    assert run([*short, "--skip-train", "--load", folder, "--load-iteration", 2]) == 0
    assert metrics(folder)[: len(before)] == before and (folder / "progress.json").read_text() == note
    assert [line["iteration"] for line in metrics(folder)[len(before) :]] == [2, 2]
    assert (folder / "stop").exists() and (folder / ".lock").read_text() == holder.to_text()


def test_ramp_up_and_reshuffling_resume_exactly(flags, tmp_path):
    counted_in_steps = {"--train-iters", "--lr-warmup-iters"}
    kept = [flag for name, flag in zip(["", *flags], flags, strict=False) if not {name, flag} & counted_in_steps]
    ramp = [*kept, "--rampup-batch-size", "2", "2", "8", "--train-samples", "40", "--dataloader-type", "cyclic"]
    assert run(ramp) == 0
    whole = {line["iteration"]: line for line in without_times(metrics(tmp_path / "run")) if "split" not in line}
    split = [flag if flag != str(tmp_path / "run") else str(tmp_path / "split") for flag in ramp]
    assert run([*split, "--auto-resume", "--exit-interval", "4"]) == Exit.STOPPED
    assert run([*split, "--auto-resume"]) == 0
    assert {line["iteration"]: line for line in without_times(metrics(tmp_path / "split")) if "split" not in line} == whole


def test_a_schedule_of_batch_sizes_resumes_exactly(flags, tmp_path):
    """Three steps of 2 samples, then three of 4; warm-up over two steps, WSD's decay over the last two."""
    kept = [flag for name, flag in zip(["", *flags], flags, strict=False) if "--global-batch-size" not in (name, flag)]
    steps = [
        *kept,
        "--step-batch-size-schedule",
        "0:2 192:4",
        "--train-iters",
        "6",
        "--eval-iters",
        "1",
        "--lr-warmup-init",
        "1e-3",
    ]
    steps += ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "2", "--lr-wsd-decay-style", "linear"]
    assert run(steps) == 0
    whole = {line["iteration"]: line for line in without_times(metrics(tmp_path / "run")) if "split" not in line}
    assert [line["consumed_samples"] for line in whole.values()] == [2, 4, 6, 10, 14, 18]
    rates = [5.5e-3, 1e-2, 1e-2, 1e-2, 5e-3, 0.0]  # of the step that follows
    assert [line["learning_rate"] for line in whole.values()] == pytest.approx(rates)
    split = [flag if flag != str(tmp_path / "run") else str(tmp_path / "split") for flag in steps]
    assert run([*split, "--auto-resume", "--exit-interval", "2"]) == Exit.STOPPED
    assert run([*split, "--auto-resume"]) == 0
    assert {line["iteration"]: line for line in without_times(metrics(tmp_path / "split")) if "split" not in line} == whole


def test_the_fused_kernels_dropout_follows_the_seed_and_resumes(flags, tmp_path):
    fused = [*flags, "--fused-attention-dropout", "--hidden-dropout", "0"]
    assert run(fused) == 0
    split = [flag if flag != str(tmp_path / "run") else str(tmp_path / "split") for flag in fused]
    assert run([*split, "--exit-interval", "7"]) == Exit.STOPPED
    assert run([*split, "--auto-resume"]) == 0
    assert without_times(metrics(tmp_path / "split")) == without_times(metrics(tmp_path / "run"))


def test_an_optimizer_state_that_is_not_there(flags, tmp_path, capsys):
    assert run([*flags, "--no-save-optim", "--exit-interval", "3"]) == Exit.STOPPED
    assert run([*flags, "--load", tmp_path / "run"]) == 2
    assert "start a new one with --no-load-optim" in capsys.readouterr().err
    assert run([*flags, "--load", tmp_path / "run", "--no-load-optim"]) == 0


def test_another_model_than_the_checkpoints_is_refused(flags, tmp_path, capsys):
    assert run([*flags, "--train-iters", "3"]) == 0
    assert run([*flags, "--load", tmp_path / "run", "--hidden-size", "48", "--num-layers", "3"]) == 2
    error = capsys.readouterr().err
    assert "`--hidden-size 48`" in error and "`--num-layers 3`" in error and "32" in error


def test_a_nonfinite_gradient_skips_or_aborts(flags, tmp_path, capsys):
    """A learning rate of 1e30 makes the second step's loss infinite or NaN."""
    wild = [*flags, "--lr", "1e30", "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--clip-grad", "0"]
    assert run([*wild, "--on-nonfinite", "abort"]) == 1
    assert "the gradient is not finite" in capsys.readouterr().err
    assert run([*wild, "--max-consecutive-skips", "3"]) == 1
    assert "as in the 2 steps before; --max-consecutive-skips stops here" in capsys.readouterr().err
    last = [line for line in metrics(tmp_path / "run") if "split" not in line][-1]
    assert last["skipped_iterations"] == 1 and last["lm_loss"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--load", "/nowhere"], "/nowhere"),
        (["--data-path", "/nowhere/text"], "/nowhere/text"),
        (["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "/nowhere.json", "--merge-file", "/no.txt"], "/nowhere.json"),
        (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size 3"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/nowhere"], "/nowhere"),
        (["--split", "100,0,0", "--eval-iters", "-1"], "--eval-iters -1"),
        (["--split", "0,1,1"], "nothing to train on"),
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "300", "--metrics-path", "/tmp"], "it is a directory"),
    ],
)
def test_what_is_wrong_is_said_once_without_a_traceback(flags, change, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(run([*flags, *change]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "error: " in error


def test_five_mistakes_at_once_in_seconds(flags):
    """In a process of its own: the answer comes before torch is of any use."""
    wrong = ["--num-layers", "x", "--hiden-size", "3", "--lr", "-1", "--num-attention-heads", "5", "--clip-grad", "-1"]
    command = [sys.executable, ROOT / "pretrain_gpt.py", *flags, *wrong]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    for word in ("--num-layers", "--hiden-size", "--hidden-size", "--lr", "--num-attention-heads", "--clip-grad"):
        assert word in done.stderr
