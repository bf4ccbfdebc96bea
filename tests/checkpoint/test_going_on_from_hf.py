"""The documentation's way from a Hugging Face model to a Hugging Face model, and which tokens end documents on it."""

import json
import re
import runpy
import shlex
import sys
from inspect import signature
from pathlib import Path

import pytest
from hf_directories import CHAT, write_files, write_model
from tokenizers import AddedToken

from megatron.checkpoint.tokenizer import open_tokenizer
from megatron.cli.program import pretrain
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer import ByteTokenizer

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
# What a test on a tiny model takes less of.
SMALLER = {"--train-iters": "2", "--global-batch-size": "4"}
END, TURN = 256, 258  # ids of <|endoftext|> and <|im_end|>


def lines() -> list[list[str]]:
    """Commands of the block in docs/checkpoints.md that imports, trains and exports, in words."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "docs/checkpoints.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (b for b in blocks if "import_hf.py" in b and "pretrain_gpt.py" in b)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def run(monkeypatch, words: list[str]) -> int:
    """The exit status of a command in this process; torchrun's ranks are one here."""
    smaller = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "torchrun":
        return pretrain(smaller[smaller.index("pretrain_gpt.py") + 1 :], program="pretrain_gpt.py", defaults={})
    assert words[0] == "python"
    monkeypatch.setattr(sys, "argv", smaller[1:])
    program = runpy.run_path(str(ROOT / smaller[1]))
    try:
        return program["main"](smaller[2:]) if signature(program["main"]).parameters else program["main"]()
    except program.get("DataError", ()) as error:  # as its last lines do
        print(f"error: {error}", file=sys.stderr)
        return 2


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A chat model: its tokenizer ends turns with <|im_end|>, and has the base model's <|endoftext|>."""
    folder = tmp_path_factory.mktemp("source") / "gpt2-medium"
    folder.mkdir()
    backend = ByteTokenizer().backend()
    backend.add_special_tokens([AddedToken(f"<|im_{end}|>", special=True, normalized=False) for end in ("start", "end")])
    write_model(folder, "gpt2", 259, bos_token_id=END, eos_token_id=TURN)
    backend.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT}
    write_files(folder, tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast", **roles})
    return folder


@pytest.fixture
def here(source, tmp_path, monkeypatch) -> Path:
    """A directory where the page's commands find what they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-medium").symlink_to(source)
    (tmp_path / "corpus.jsonl").write_text('{"text": "hello, the <|im_end|> quick brown fox"}\n' * 1000)
    return tmp_path


def test_the_page_leads_from_hugging_face_to_hugging_face(here, monkeypatch, capsys) -> None:
    """With another end of document: what preprocessing was told is what training, the checkpoint and the export have."""
    imported, preprocess, training, export = lines()
    assert run(monkeypatch, imported) == 0
    assert run(monkeypatch, preprocess) == 0
    out = capsys.readouterr().out
    assert "end of document: '<|im_end|>' (id 258), appended to each document" in out
    assert "(id 256), which base models use as end of document; --eod-token '<|endoftext|>' chooses it" in out
    assert "special tokens in the text: 1000 (<|im_end|> 1000), kept as ids" in out
    other = ["--eod-token", "<|endoftext|>", "--special-tokens-in-text", "plain"]
    assert run(monkeypatch, [*preprocess, *other]) == 0
    out = capsys.readouterr().out
    assert "end of document: '<|endoftext|>' (id 256)" in out and "(<|im_end|> 1000), read as plain text" in out
    document = IndexedDataset("runs/more_text_document")[0].tolist()
    assert bytes(document[:-1]) == b"hello, the <|im_end|> quick brown fox" and document[-1] == END
    assert run(monkeypatch, [*training, "--eod-token", "258"]) == 2
    err = capsys.readouterr().err
    assert "of the same vocabulary but other special tokens" in err and "give --eod-token 256" in err
    assert run(monkeypatch, [*training, "--reset-position-ids", "--eod-mask-loss", "--eval-iters", "1"]) == 0
    out = capsys.readouterr().out
    assert "the end of document is '<|endoftext|>' (id 256), as chosen by --eod-token when runs/more_text_document was" in out
    saved = json.loads(Path("runs/gpt-more/iter_0000002/config.json").read_text())
    assert saved["data"]["seq_length"] == 32 and saved["tokenizer"]["eod_token"] == "256"
    assert open_tokenizer(Path("runs/gpt-more/iter_0000002")).eod == END  # where generation stops
    assert run(monkeypatch, export) == 0
    ends = [
        json.loads((Path("runs/gpt-more-hf") / f"{n}.json").read_text())["eos_token_id"]
        for n in ("config", "generation_config")
    ]
    assert ends == [[END, TURN], [END, TURN]]
