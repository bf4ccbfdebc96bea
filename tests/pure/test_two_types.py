"""Settings as a user gave them and as a run uses them are two types, which a checker tells apart and whose fields agree."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest

from megatron.config.resolve import resolve, resolve_model
from megatron.config.schema import (
    BatchSettings,
    DataSettings,
    ModelConfig,
    ModelSettings,
    RunConfig,
    RunSettings,
    sections,
)

ROOT = Path(__file__).parents[2]
USES = """
from megatron.config.resolve import resolve, resolve_model
from megatron.config.rules import check, divisible_remaining_sizes
from megatron.config.schema import BatchConfig, LayoutConfig, ModelConfig, ModelSettings, RunConfig, RunSettings

settings = RunSettings(model=ModelSettings(num_layers=2))
run = resolve(settings)


def width(config: RunConfig) -> int:
    return config.model.hidden_size


def given(config: RunSettings) -> int:
    return config.model.hidden_size  # refused


width(run)
width(settings)  # refused
divisible_remaining_sizes(run, 1, 0)
divisible_remaining_sizes(settings, 1, 0)  # refused
check(settings)
check(run)
resolve(run)
resolve_model(settings.model).kv_channels + 1
settings.model.kv_channels + 1  # refused
run.data.seq_length * run.batch.micro_batch_size * run.batch.global_batch_size + run.optim.start_weight_decay
settings.batch.global_batch_size + 1  # refused
run.layout.pipeline_schedule.upper()
settings.layout.pipeline_schedule.upper()  # refused
run.model.vocab_size + 1  # refused
run.model.known_vocab_size + 1
BatchConfig(micro_batch_size=1, global_batch_size=2)
BatchConfig(micro_batch_size=1)  # refused
LayoutConfig()  # refused
"""
MODEL = ModelSettings(num_layers=2, hidden_size=8, num_attention_heads=2, max_position_embeddings=4)
SMALL = RunSettings(model=MODEL, data=DataSettings(seq_length=4), batch=BatchSettings(micro_batch_size=2))


def test_a_type_checker_tells_them_apart(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "uses.py").write_text(USES)
    words = ["-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", "--config-file=", "uses.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    assert found == {n for n, line in enumerate(USES.splitlines(), 1) if line.endswith("# refused")}, done.stdout + done.stderr


def test_a_run_is_settings_in_which_nothing_is_open() -> None:
    run = resolve(SMALL)
    assert isinstance(run, RunConfig) and isinstance(run, RunSettings)
    assert (run.model.ffn_hidden_size, run.model.kv_channels, run.model.num_query_groups) == (32, 4, 2)
    assert (run.batch.global_batch_size, run.layout.pipeline_schedule, run.optim.end_weight_decay) == (2, "1f1b", 0.01)
    for section, kind in get_type_hints(RunConfig).items():
        assert type(getattr(run, section)) is kind
        always = [field.name for field in fields(kind) if field.default is MISSING]
        assert not [name for name in always if getattr(getattr(run, section), name) is None]
    assert resolve(run) == run


def test_both_types_of_a_section_have_the_same_fields_in_the_same_order() -> None:
    """So that they are saved alike, and a flag is there wherever it is declared."""
    for section, kind in get_type_hints(RunConfig).items():
        assert [field.name for field in fields(kind)] == [field.name for field in fields(sections()[section])]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (RunSettings(), "ModelConfig.num_layers"),
        (RunSettings(model=MODEL), "DataConfig.seq_length"),
        (RunSettings(model=MODEL, data=SMALL.data), "BatchConfig.micro_batch_size"),
    ],
)
def test_what_is_missing_is_named(settings: RunSettings, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not resolved"):
        resolve(settings)


def test_a_model_is_resolved_without_a_run() -> None:
    model = resolve_model(MODEL)
    assert type(model) is ModelConfig and model == resolve(SMALL).model and resolve_model(model) == model
    with pytest.raises(ValueError, match="3 attention heads do not divide the width 8"):
        resolve_model(ModelSettings(num_layers=1, hidden_size=8, num_attention_heads=3, max_position_embeddings=4))
    with pytest.raises(ValueError, match=r"ModelConfig\.vocab_size is not resolved"):
        _ = model.known_vocab_size
    with pytest.raises(TypeError, match="kv_channels"):
        ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
