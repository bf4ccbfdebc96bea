"""The command line: what it understands, and that it tells all mistakes at once."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron.cli.program import pretrain
from megatron.config.command_line.help import help_text
from megatron.config.command_line.parse import HelpRequested, Parsed, parse
from megatron.config.command_line.saved import from_json, to_json, to_toml
from megatron.config.command_line.spelling import spellings
from megatron.config.errors import ConfigError, Problem
from megatron.config.options import options
from megatron.config.presets import PRESETS
from megatron.config.resolve import resolve, resolve_model
from megatron.config.schema import MemoryConfig, ModelConfig, ModelSettings, PrecisionConfig, RunConfig, RunSettings, sections

BASE = shlex.split(
    "--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 2 --train-iters 10 --lr 1e-3 --tokenizer-type ByteTokenizer --data-path data"
)


def parse_with(*extra: str, **options_: Any) -> Parsed:
    return parse([*BASE, *extra], program="test", check_disk=False, **options_)


def mistakes(*argv: str, **options_: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(list(argv), program="test", **{"check_disk": False, **options_})
    return [str(p) for p in caught.value.problems]


def test_flags_set_their_fields() -> None:
    parsed = parse_with("--num-layers", "3", "--bf16", "--lr=2e-4", "--disable-bias-linear", "--swiglu", "--split", "90,10")
    c = parsed.config
    assert (c.model.num_layers, c.precision.bf16, c.optim.lr, c.data.split) == (3, True, 2e-4, "90,10")
    assert (c.model.add_bias_linear, c.model.activation) == (False, "swiglu")
    assert c.data.data_path == ("data",)
    assert "model.num_layers" in parsed.set_by_user and "model.kv_channels" not in parsed.set_by_user


@pytest.mark.parametrize("option", [o for o in options() if o.section != "command"], ids=lambda o: o.name)
def test_every_option_can_be_typed_and_written_to_a_file(option: Any, tmp_path: Path) -> None:
    from megatron.config.command_line.arguments import read_arguments
    from megatron.config.command_line.toml_file import read_toml

    other = {int: 7, float: 0.25, str: (option.choices or ("word",))[-1], bool: not option.default}[option.kind]
    words = [option.flag] if option.kind is bool else [option.flag, str(other)]
    by_flag = read_arguments(words)
    value = (other,) if option.many else other
    assert (by_flag.values, by_flag.problems) == ({option.name: value}, [])
    changed = RunSettings(**{option.section: sections()[option.section](**{option.field: value})})
    (tmp_path / "run.toml").write_text(to_toml(changed))
    from_file = read_toml(str(tmp_path / "run.toml"))
    assert from_file.values[option.name] == value and from_file.problems == []
    assert from_json(to_json(changed)) == changed != RunSettings()


def test_parsing_habits_of_megatron_scripts() -> None:
    assert parse_with("--eval-it", "5").config.eval.eval_iters == 5
    assert parse_with("--lr", "1", "--lr", "2").config.optim.lr == 2.0
    assert parse_with("--local_rank", "3", "--local-rank=2").config == parse_with().config
    assert parse_with("--num_workers", "0").config.data.num_workers == 0
    assert parse_with("--override-lr-scheduler").config.optim.override_opt_param_scheduler
    assert parse_with("--override-opt_param-scheduler").config.optim.override_opt_param_scheduler
    assert parse_with("--data-path", "0.3", "a", "0.7", "b").config.data.data_path == ("0.3", "a", "0.7", "b")
    ramp = ("--rampup-batch-size", "2", "2", "100", "--global-batch-size", "8", "--train-samples", "1000")
    without_iterations = [w for w in BASE if w not in ("--train-iters", "10")]
    assert parse([*without_iterations, *ramp], program="t", check_disk=False).config.batch.rampup_batch_size == (2, 2, 100)
    assert mistakes(*BASE, "--seed", "-1") == ["`--seed -1` must be 0 or greater"]  # a value, not a flag


def test_a_value_may_be_left_out_where_the_flag_alone_means_something(tmp_path: Path) -> None:
    assert parse_with("--profile-pipeline", "--bf16").config.log.profile_pipeline == "pipeline_profile"
    assert parse_with("--profile-pipeline", "there", "--bf16").config.log.profile_pipeline == "there"
    assert parse_with("--profile-pipeline=there").config.log.profile_pipeline == "there"
    assert parse_with("--bf16", "--profile-pipeline").config.precision.bf16
    assert mistakes(*BASE, "--profile-pipeline", "one", "two") == ["`two` belongs to no flag"]
    assert mistakes(*BASE, "--save") == ["`--save` needs a value after it"]
    file = tmp_path / "run.toml"
    for value, meaning in (("true", "pipeline_profile"), ("false", None), ("'there'", "there")):
        file.write_text(f"[log]\nprofile-pipeline = {value}\n")
        assert parse_with("--config", str(file)).config.log.profile_pipeline == meaning
    file.write_text("[log]\nprofile-pipeline = 3\n")
    assert mistakes(*BASE, "--config", str(file)) == [f"`profile-pipeline = 3` in {file} is not a string"]
    file.write_text("[log]\ntensorboard-dir = true\n")
    assert "cannot be true or false" in mistakes(*BASE, "--config", str(file))[0]
    assert "--profile-pipeline [DIR]" in help_text("x")
    unwritable = mistakes(*BASE, "--profile-pipeline", str(file), check_disk=True)
    assert f"`--profile-pipeline {file}` cannot be written: {file} is a file, not a directory" in unwritable


def test_a_prefix_is_noted_and_an_ambiguous_one_refused() -> None:
    assert "--eval-it is read as --eval-iters" in parse_with("--eval-it", "5").notes
    assert mistakes(*BASE, "--num-l", "5") == ["`--num-l` could be --num-layers, --num-layers-per-virtual-pipeline-stage"]


def test_all_mistakes_at_once_and_each_once() -> None:
    lines = mistakes(
        *BASE, "--num-layers", "abc", "--hidden-dropout", "1.5", "--nmu-workers", "4", "--bert-load", "x", "--bf16",
        "stray", "--seq-length", "1024", "--optimizer", "lamb", "--lr", "nan", "--sequence-parallel=yes", "--save",
    )  # fmt: skip
    assert sorted(lines) == sorted(
        [
            "`--num-layers abc` is not an integer",
            "`--nmu-workers` is not a known flag; did you mean --num-workers?",
            "`stray` belongs to no flag",
            "`--bert-load` belongs to retrieval with BERT, which is not available",
            "`--optimizer lamb` is not known; legal: adam, sgd",
            "`--lr nan` is not a finite number",
            "`--sequence-parallel=yes` takes no value",
            "`--save` needs a value after it",
            "`--hidden-dropout 1.5` must be at least 0 and less than 1",
            "`--max-position-embeddings 8` is less than `--seq-length 1024`; legal: 1024 or more",
        ]
    )


def test_two_spellings_that_disagree() -> None:
    assert mistakes(*BASE, "--swiglu", "--squared-relu") == [
        "`--swiglu` and `--squared-relu` set the same thing to different values"
    ]
    assert "`--num-layers` and `--encoder-num-layers`" in mistakes(*BASE, "--encoder-num-layers", "5")[0]
    assert parse_with("--encoder-num-layers", "2").config.model.num_layers == 2


def test_the_process_prints_all_mistakes_fast_and_without_a_traceback(tmp_path: Path) -> None:
    program = "import sys; from megatron.cli.program import pretrain; pretrain(sys.argv[1:], program='p', defaults={})"
    five = ["--num-layers", "x", "--lr", "y", "--unheard-of", "1", "--num-experts", "3", "--load", str(tmp_path / "gone")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", program, *BASE, *five], capture_output=True, text=True, check=False)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3  # of a processor, whoever else wants it
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in ("--num-layers x", "--lr y", "--unheard-of", "--num-experts", "gone"):
        assert sum(word in line for line in errors) == 1, done.stderr
    second = {"RANK": "1", "WORLD_SIZE": "2", "PATH": ""}
    quiet = subprocess.run([sys.executable, "-c", program, *five], capture_output=True, text=True, check=False, env=second)
    assert (quiet.returncode, quiet.stderr) == (2, "")


def test_importing_the_command_line_imports_no_torch() -> None:
    code = "import sys, megatron.config.command_line.parse; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_names_every_flag_with_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text("pretrain_gpt.py")
    for spelling in spellings().values():
        assert (f"{spelling.flag}" in text) or spelling.option.section == "task", spelling.flag
        assert spelling.flag in help_text("tasks/main.py", task=True)
    for section in sections():
        assert (f"[{section}]" in text) == (section != "task")
    words = " ".join(text.split())  # without the line breaks
    assert "default: 0.1" in words and "one of adam, sgd" in words
    assert pretrain(["--help", "--nonsense"], program="pretrain_gpt.py", defaults={}) == 0
    assert capsys.readouterr().out == text
    with pytest.raises(HelpRequested, match=r"megatron \d"):
        parse(["--version"], program="x")


def test_order_of_precedence(tmp_path: Path) -> None:
    def saved(_: object) -> dict[str, Any]:
        return to_json(
            RunSettings(model=ModelSettings(num_layers=11, hidden_size=64, num_attention_heads=8, rotary_percent=0.5))
        )

    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "manifest.json").write_text("{}")
    file = tmp_path / "run.toml"
    file.write_text("[model]\nnum_layers = 4\n[eval]\neval-iters = 3\n[data]\nsplit = '8,1,1'\n")
    sizes = shlex.split("--num-layers 2 --hidden-size 16 --num-attention-heads 4")
    argv = [*BASE[len(sizes) :], "--use-checkpoint-args", "--load", str(tmp_path / "iter_0000001")]
    defaults = {"eval.eval_iters": 9, "log.log_interval": 5, "model.num_layers": 8}

    def run(*extra: str) -> RunConfig:
        return parse([*argv, *extra], program="t", read_saved=saved, defaults=defaults, check_disk=False).config

    assert run().model.num_layers == 11
    assert run("--config", str(file)).model.num_layers == 4
    assert run("--config", str(file), "--num-layers", "5").model.num_layers == 5
    assert run("--config", str(file), "--num-layers", "5").model.hidden_size == 64
    assert (run().eval.eval_iters, run("--config", str(file)).eval.eval_iters) == (9, 3)
    assert run().log.log_interval == 5 and run("--log-interval", "6").log.log_interval == 6
    preset = run("--preset", "gpt2-345m", "--num-layers", "5").model
    assert (preset.num_layers, preset.hidden_size, preset.num_attention_heads) == (5, 1024, 16)
    with pytest.raises(ValueError, match=r"no\.such"):
        parse([], program="t", defaults={"no.such": 1})


def test_an_unreadable_checkpoint_is_one_mistake(tmp_path: Path) -> None:
    def saved(_: object) -> dict[str, Any]:
        raise ConfigError([Problem("`--load x`", "is broken")])

    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "manifest.json").write_text("{}")
    rest = shlex.split(
        "--seq-length 8 --micro-batch-size 2 --train-iters 10 --lr 1 --tokenizer-type ByteTokenizer --data-path d"
    )
    load = str(tmp_path / "iter_0000001")
    assert mistakes(*rest, "--use-checkpoint-args", "--load", load, read_saved=saved) == ["`--load x` is broken"]
    # A --load with nothing there is the file rules' to report, and the sizes it would have given are not asked for.
    assert mistakes(*rest, "--use-checkpoint-args", "--load", "/no/such", read_saved=saved, check_disk=True)[0].startswith(
        "`--data-path d`"
    )


def test_toml_and_json_round_trips(tmp_path: Path) -> None:
    config = parse_with("--swiglu", "--disable-bias-linear", "--data-path", "0.5", 'a "quoted" päth\\', "0.5", "b").config
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert parse(["--config", str(file)], program="t", check_disk=False).config == config
    assert resolve(from_json(to_json(config))) == config
    assert resolve_model(from_json({"model": to_json(config)["model"]}).model) == config.model


def test_json_of_another_version_names_what_is_unknown() -> None:
    with pytest.raises(ConfigError) as caught:
        from_json({"model": {"num_layers": 2, "flux": 1}, "nets": {}, "optim": {"lr": "fast"}})
    text = str(caught.value)
    assert "`model.flux`" in text and "`nets`" in text and "`optim.lr = 'fast'`" in text and "num_layers" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[model]\nnum-layer = 2",
            "`num-layer` under [model] in FILE is not a known key; did you mean num-layers?",
        ),
        ("[model]\nseq-length = 2", "`seq-length` under [model] in FILE is not a known key; it belongs under [data]"),
        ("seq-length = 2", "`seq-length` before the first table in FILE is not a known key; it belongs under [data]"),
        ("[modle]\nx = 2", "`[modle]` in FILE is not a section of a run; did you mean model?; legal: model, layout"),
        ("[model]\nnum-layers = 'two'", "`num-layers = 'two'` in FILE is not an integer"),
        ("[model]\nnum-layers = 2.5", "`num-layers = 2.5` in FILE is not an integer"),
        ("[model]\nnum-layers = true", "`num-layers = true` in FILE cannot be true or false"),
        ("[optim]\nlr = nan", "`lr = nan` in FILE is not a finite number"),
        ("[precision]\nbf16 = 1", "`bf16 = 1` in FILE must be true or false"),
        ("[precision]\nfp32-residual-connection = true", "`fp32-residual-connection in FILE` is not available yet"),
        ("[model]\nactivation = 'tanh'", "`activation = 'tanh'` in FILE is not known; legal: gelu, gelu-exact"),
        ("[model]\nswiglu = true\nactivation = 'gelu'", "`swiglu` and `activation` set the same thing"),
        ("[model\n", "`--config FILE` is not valid TOML: "),
        ("preset = 'gpt5'", "`preset = 'gpt5'` in FILE is not known; legal: gpt2-125m"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    lines = mistakes(*BASE, "--config", str(file))
    assert len(lines) == 1 and lines[0].startswith(message.replace("FILE", str(file))), lines


def test_flags_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("preset = 'llama-7b'\n[model]\ndisable-bias-linear = true\nswiglu = true\n[data]\ndata_path = 'one'\n")
    config = parse_with("--config", str(file)).config
    assert config.model.normalization == "RMSNorm" and config.data.data_path == ("data",)
    assert mistakes("--config", str(tmp_path / "no.toml"))[0].endswith("cannot be read: No such file or directory")
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in mistakes(*BASE, "--config", str(file))[0]


def test_recomputation_has_the_flags_of_megatron() -> None:
    assert parse_with("--recompute-activations").config.memory == MemoryConfig("selective")
    full = shlex.split("--recompute-granularity full --recompute-method block --recompute-num-layers 3")
    assert parse_with(*full).config.memory == MemoryConfig("full", "block", 3)
    uniform = shlex.split("--recompute-granularity full --recompute-method uniform --distribute-saved-activations")
    two = parse_with(*uniform, "--tensor-model-parallel-size", "2", world_size=2)
    assert two.config.memory == MemoryConfig("full", "uniform", 1, True) and parse_with().config.memory == MemoryConfig()
    assert mistakes(*BASE, "--recompute-activations", "--recompute-granularity", "full")[0] == (
        "`--recompute-activations` and `--recompute-granularity` set the same thing to different values"
    )
    (line,) = mistakes(*BASE, "--recompute-modules", "core_attn", "mlp")
    assert line.startswith("`--recompute-modules core_attn mlp` is not available; --recompute-granularity selective")


def test_precision_has_the_flags_of_megatron() -> None:
    scale = shlex.split("--fp16 --initial-loss-scale 65536 --min-loss-scale 2 --loss-scale-window 500 --hysteresis 4")
    assert parse_with(*scale).config.precision == PrecisionConfig(False, True, None, 65536.0, 2.0, 500.0, 4)
    assert parse_with("--fp16", "--loss-scale", "128").config.precision.loss_scale == 128.0
    assert parse_with().config.precision == PrecisionConfig(False, False, None, 2.0**32, 1.0, 1000.0, 2)
    assert [parse_with(*flag).config.precision.is_16bit for flag in ((), ("--bf16",), ("--fp16",))] == [False, True, True]
    assert parse_with("--skip-train-iterations", "3", "7-9").config.batch.skip_train_iterations == ("3", "7-9")
    assert parse_with("--skip-train").config.eval.skip_train  # exact, though the beginning of another flag


def test_a_configuration_saved_before_there_was_fp16() -> None:
    saved = to_json(parse_with("--bf16").config)
    saved["precision"] = {"bf16": True}
    del saved["batch"]["skip_train_iterations"]
    assert resolve(from_json(saved)) == parse_with("--bf16").config


def test_a_configuration_saved_before_there_was_recomputation() -> None:
    saved = to_json(parse_with().config)
    del saved["memory"]
    assert resolve(from_json(saved)) == parse_with().config


def test_a_configuration_saved_before_there_were_pipelines() -> None:
    saved = to_json(parse_with().config)
    for section, field in (("layout", "pipeline_stage_layers"), ("log", "profile_pipeline")):
        del saved[section][field]
    assert resolve(from_json(saved)) == parse_with().config


def test_presets_are_fields_of_the_model() -> None:
    for name, preset in PRESETS.items():
        assert set(preset) <= {f.name for f in fields(ModelConfig)}
        assert ModelSettings(**preset).num_layers == preset["num_layers"], name


def test_world_size_belongs_to_the_dry_run() -> None:
    assert "needs --dry-run" in mistakes(*BASE, "--world-size", "8")[0]
    assert parse_with("--dry-run", "--world-size", "8").config.batch.global_batch_size == 16
    assert parse_with("--dry-run").dry_run and not parse_with().dry_run
    assert parse_with(world_size=3).config.batch.global_batch_size == 6
    assert "must be greater than 0" in mistakes(*BASE, "--dry-run", "--world-size", "0")[0]


def test_flags_that_change_nothing_are_noted() -> None:
    assert any("--sequence-parallel changes nothing" in n for n in parse_with("--sequence-parallel").notes)
    pipeline = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage"]
    assert parse_with(*pipeline, "1", "--num-layers", "4", world_size=2).notes == ()
    assert parse_with(*pipeline, "3", "--num-layers", "7", world_size=2).notes == (
        "--num-layers-per-virtual-pipeline-stage 3 changes nothing: 7 layers on 2 pipeline ranks are one stage each",
    )
    assert any("without --save" in n for n in parse_with("--save-interval", "5").notes)
    assert parse_with().notes == ()
