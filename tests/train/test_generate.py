"""Generation: equal with and without the cache and to Hugging Face, sampling by its definition, bad input refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_gpts import POSITIONS, as_pipeline, build_random_gpt, save_model
from ranks import on_ranks
from reference import GPT2, LLAMA

from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.generate import batch_of_rows, choose_device, generate_tokens
from megatron.inference.restore import open_pipeline
from megatron.inference.sampling import Sampling
from megatron.interop.hf_export import export_weights
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.model.gpt import GPT

TOOL = Path(__file__).parents[2] / "tools" / "generate.py"
GREEDY = Sampling(temperature=0.0)
PROMPT = [5, 99, 17, 3]


def generated(model: GPT, sampling: Sampling = GREEDY, count: int = 32, **options) -> list[int]:
    return list(generate_tokens(as_pipeline(model), PROMPT, max_new_tokens=count, sampling=sampling, **options))


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_greedy_text_is_that_of_hugging_face(form, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build_random_gpt(form)
    export_weights(save_model(model, tmp_path), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float().eval()
    prompt = torch.tensor([PROMPT])
    text = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = generated(model)
    assert ours == text[0, len(PROMPT) :].tolist()
    assert len(ours) == 32 and len(set(ours)) > 8  # more than one answer repeated


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 20, 0.9)], ids=["greedy", "sampled"])
def test_the_cache_changes_nothing(form, sampling):
    model = build_random_gpt(form)
    assert generated(model, sampling) == generated(model, sampling, use_cache=False)


def test_sampled_text_depends_on_the_seed_only():
    model = build_random_gpt(LLAMA)
    first = generated(model, Sampling(), seed=1)
    torch.manual_seed(99)
    torch.rand(5)
    assert generated(model, Sampling(), seed=1) == first
    assert generated(model, Sampling(), seed=2) != first


def test_the_one_most_probable_token_is_the_greedy_one():
    model = build_random_gpt(LLAMA)
    for only in (Sampling(1.0, 1), Sampling(1.0, 0, 1e-9), Sampling(1e-40), Sampling(5e-324)):
        assert generated(model, only, seed=3) == generated(model)
    tied = torch.tensor([0.0, 2.0, 2.0, 2.0])
    assert drawn_tokens(Sampling(1.0, 1), tied) == drawn_tokens(GREEDY, tied) == {1}


def drawn_tokens(sampling: Sampling, logits: torch.Tensor) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {sampling.choose(logits, generator) for _ in range(300)}


def test_top_k_and_top_p_keep_the_fewest_that_suffice():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    assert drawn_tokens(Sampling(), logits) == drawn_tokens(Sampling(1.0, 9, 1.0), logits) == {0, 1, 2, 3, 4}
    assert drawn_tokens(Sampling(1.0, 3), logits) == {1, 3, 4}
    assert drawn_tokens(Sampling(1.0, 0, 0.39), logits) == {1}
    assert drawn_tokens(Sampling(1.0, 0, 0.41), logits) == drawn_tokens(Sampling(1.0, 0, 0.69), logits) == {1, 3}
    assert drawn_tokens(Sampling(1.0, 0, 0.71), logits) == {1, 3, 4}
    # Of the three most probable, 0.4 / 0.85 and 0.3 / 0.85 are 0.82 together; without the cut to three they are 0.7.
    assert drawn_tokens(Sampling(1.0, 3, 0.8), logits) == {1, 3} and drawn_tokens(Sampling(1.0, 0, 0.8), logits) == {1, 3, 4}


def test_samples_follow_the_probabilities():
    logits, generator = torch.tensor([0.2, 0.5, 0.3]).log(), torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        counts = torch.zeros(3)
        for _ in range(1500):
            counts[Sampling(temperature).choose(logits, generator)] += 1
        torch.testing.assert_close(counts / 1500, (logits / temperature).softmax(0), rtol=0, atol=0.05)


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_padding_rows_are_never_sampled(form):
    model = build_random_gpt(form)
    weight = model.output.matrix
    assert weight.shape[0] == 128
    with torch.no_grad():  # the padding row would win: its logit is the largest of all
        x = model.hidden(None, batch_of_rows([PROMPT], torch.device("cpu")))[-1, 0]
        weight[127] = 100 * x
    assert max(generated(model)) < 127
    assert max(generated(model, Sampling(50.0), 44)) < 127


def test_the_stop_token_and_the_last_position_end_the_text():
    model = build_random_gpt(GPT2)
    free = generated(model, count=1000)
    assert len(free) == POSITIONS - len(PROMPT)
    at = free.index(free[20])
    assert generated(model, stop=free[20]) == free[:at]
    assert generated(model, count=7) == free[:7]
    assert len(generated(build_random_gpt(LLAMA), count=60)) == 60  # rotary positions do not end


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "becomes no tokens"),
        ([1] * POSITIONS, "48 tokens, the model 48 positions"),
        ([1] * 60, "60 tokens, the model 48 positions"),
        ([1, 127], "token 127"),
        ([-1], "token -1"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        list(generate_tokens(as_pipeline(build_random_gpt(GPT2)), prompt, max_new_tokens=2, sampling=GREEDY))


def test_a_damaged_model_is_refused():
    model = build_random_gpt(GPT2)
    with torch.no_grad():
        model.embedding.word.weight[PROMPT[-1]] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generated(model)


def test_the_device_of_generation_is_chosen_or_refused():
    assert [choose_device(None, 0).type, choose_device(None, 2).type] == ["cpu", "cuda"]
    assert choose_device("cuda:1", 2) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="--device cuda:2 is not there: PyTorch finds 2 GPUs"):
        choose_device("cuda:2", 2)


class GenerateTool:
    """`tools/generate.py` on a checkpoint with a byte tokenizer."""

    def __init__(self, module, root: Path) -> None:
        self.module, self.root = module, root

    def __call__(self, *flags: str) -> int:
        return self.module.main(["--load", str(self.root), "--device", "cpu", "--prompt", "Hello", *flags])


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    import importlib.util

    root = tmp_path_factory.mktemp("model")
    save_model(build_random_gpt(GPT2, vocab=257), root, ByteTokenizer().files())
    spec = importlib.util.spec_from_file_location("generate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return GenerateTool(module, root)


def test_the_tool_writes_text_and_says_what_it_cut(tool, capsys):
    assert tool("--temperature", "0", "--max-new-tokens", "43") == 0
    full = capsys.readouterr()
    assert full.out.startswith("Hello") and full.err == ""
    assert tool("--temperature", "0", "--max-new-tokens", "44") == 0
    cut = capsys.readouterr()
    assert cut.out == full.out
    assert cut.err == "note: --max-new-tokens 44 was cut to 43: the model ends at position 48, and the prompt takes 5\n"
    assert tool("--temperature", "1e-40", "--no-cache", "--max-new-tokens", "43") == 0
    assert capsys.readouterr() == full


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--device bogus", "--device bogus is not known; legal: cpu, cuda, cuda:N"),
        ("--device cuda:9999", "--device cuda:9999 is not there"),
        ("--device meta", "--device meta is not known"),
        ("--temperature nan", "--temperature nan"),
        ("--temperature inf", "--temperature inf"),
        ("--temperature -1", "--temperature -1.0"),
        ("--top-p nan", "--top-p nan"),
        ("--top-p 1.5", "--top-p 1.5"),
        ("--top-k -1", "--top-k -1"),
        ("--max-new-tokens 0", "--max-new-tokens 0"),
        (
            "--tensor-model-parallel-size 0",
            "--tensor-model-parallel-size 0 x --pipeline-model-parallel-size 1; legal: 1 and above",
        ),
        ("--prompt=", "becomes no tokens"),
        ("--prompt " + "x" * 48, "48 tokens, the model 48 positions"),
        ("--load /nowhere", "/nowhere"),
        ("--load-iteration 7", "7"),
    ],
)
def test_the_tool_refuses_bad_input(tool, flags, message, capsys):
    assert tool(*flags.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1
    assert said.out == ""


def test_the_tool_as_a_process(tool):
    command = [sys.executable, str(TOOL), "--load", str(tool.root), "--prompt", "Hello", "--temperature", "nan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --temperature nan") and done.stdout == ""


# Several processes.


def written_by_several(root: str, tp: int, sampling: Sampling, use_cache: bool) -> tuple[list[int], int]:
    """The text, and how many layers this rank holds."""
    import torch.distributed as dist

    mesh = Mesh.build(Grid(tp=tp, pp=dist.get_world_size() // tp), dist.get_rank())
    model = open_pipeline(root, mesh).model
    held = sum(len(stage.layers) for stage in model.stages.values())
    return list(generate_tokens(model, PROMPT, max_new_tokens=32, sampling=sampling, use_cache=use_cache)), held


@pytest.mark.parametrize(
    ("form", "world", "tp"),
    [(GPT2, 2, 1), (GPT2, 4, 2), (LLAMA, 2, 2), (LLAMA, 4, 1)],
    ids=["tied, pp 2", "tied, tp 2 x pp 2", "untied, tp 2", "untied, pp 4"],
)
def test_a_model_cut_over_ranks_writes_the_same_text(form, world, tp, tmp_path):
    """Tied and untied, with and without the cache, greedy and sampled; every rank gets all of it."""
    form, layers = replace(form, num_layers=5), 5
    save_model(build_random_gpt(form), tmp_path)
    for sampling, use_cache in ((GREEDY, True), (GREEDY, False), (Sampling(0.8, 20, 0.9), True)):
        alone = generated(build_random_gpt(form), sampling)
        assert len(set(alone)) > 4
        results = on_ranks(world, written_by_several, str(tmp_path), tp, sampling, use_cache)
        assert all(text == alone for text, _ in results)
        assert sum(held for _, held in results) == layers * tp and max(held for _, held in results) <= layers


def on_processes(root: Path, count: int, *flags: str) -> list[tuple[int, str, str]]:
    """The tool on `count` processes, as torchrun starts them: status, output and errors of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [os.environ["WARM_PYTHON"], str(TOOL), "--load", str(root), "--prompt", "Hello", *flags]
    job = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        place = {name: str(value) for name, value in {**job, "RANK": rank, "LOCAL_RANK": rank}.items()}
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, **place},
            )
        )
    ended = [process.communicate(timeout=100) for process in started]
    return [(process.returncode, out, err) for process, (out, err) in zip(started, ended, strict=True)]


def test_the_tool_on_several_processes(tool, capsys):
    assert tool("--temperature", "0", "--max-new-tokens", "44") == 0
    alone = capsys.readouterr()
    both = ("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2")
    first, second = on_processes(tool.root, 2, "--temperature", "0", "--max-new-tokens", "44", *both)
    assert first == (0, alone.out, alone.err) and second[:2] == (0, "")


@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, ""),
        (2, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
        (1, "--pipeline-model-parallel-size 2"),
    ],
)
def test_sizes_that_are_not_the_number_of_processes(tool, count, flags, capsys, monkeypatch):
    """Found before the processes look for one another; the first one says it."""
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setattr(tool.module, "job", None)
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        arguments = ["--load", str(tool.root), "--prompt", "Hello", *flags.split()]
        assert tool.module.main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == (rank == 0)
        if rank == 0:
            assert said.err.startswith("error: --tensor-model-parallel-size")
            assert f"there are {count}: start with torchrun --nproc_per_node" in said.err


@pytest.mark.parametrize(
    ("count", "flags", "message"),
    [
        (3, "--tensor-model-parallel-size 3", "4 heads in 4 groups do not divide over 3"),
        (2, "--pipeline-model-parallel-size 2 --load /nowhere", "/nowhere: there is no such directory"),
    ],
)
def test_what_only_the_checkpoint_tells_is_wrong(tool, count, flags, message):
    """One rank says why, in one line; all end."""
    ended = on_processes(tool.root, count, *flags.split())
    assert all(status != 0 and out == "" for status, out, _ in ended)
    told = [err for _, _, err in ended if err.startswith("error: ")]
    assert len(told) == 1 and message in told[0] and told[0].count("error: ") == 1
    assert not any("Traceback" in err for _, _, err in ended)
