"""A file of --config that is none: it alone is told, not everything that it would have given."""

from __future__ import annotations

from pathlib import Path

import pytest
from legal_run import argv

from megatron.config.command_line.parse import parse
from megatron.config.errors import ConfigError


def mistakes(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(words, program="t", check_disk=False)
    return [str(problem) for problem in caught.value.problems]


def test_a_file_of_settings_that_cannot_be_read_is_the_only_mistake(tmp_path: Path) -> None:
    """Not what it would have given: no flag is given beside it, so all of that is missing."""
    file = tmp_path / "run.toml"
    for text, message in (
        ("[model\nnum-layers = 2\n", "`--config FILE` is not valid TOML: "),
        ("[modle]\nnum-layers = 2\n", "`[modle]` in FILE is not a section of a run; did you mean model?; legal: "),
        ("a = " + "[" * 500 + "]" * 500, "`--config FILE` is nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "`--config FILE` is a pointer of Git LFS"),
        ('{"model": {}}', "`--config FILE` is not valid TOML: "),
    ):
        file.write_text(text)
        (line,) = mistakes("--config", str(file))
        assert line.startswith(message.replace("FILE", str(file))), line
    (line,) = mistakes("--config", str(tmp_path))
    assert line == f"`--config {tmp_path}` cannot be read: a directory, not a regular file"
    (line,) = mistakes("--config", str(tmp_path / "no.toml"))
    assert line == f"`--config {tmp_path}/no.toml` cannot be read: No such file or directory"
    # One table of settings that is good goes on being checked, and a key under another table is not missing as well.
    file.write_text("num-layers = 2\n")
    lines = mistakes(*argv("--no:num-layers"), "--config", str(file))
    assert lines == [f"`num-layers` before the first table in {file} is not a known key; it belongs under [model]"]
    file.write_text("[model]\nnum-layer = 2\n")
    lines = mistakes(*argv("--no:num-layers"), "--config", str(file))
    assert len(lines) == 1 and "is not a known key; did you mean num-layers" in lines[0], lines
    file.write_bytes(b"\xef\xbb\xbf[model]\nnum-layers = 2\n")
    assert parse([*argv("--no:num-layers"), "--config", str(file)], program="t", check_disk=False).config.model.num_layers == 2
