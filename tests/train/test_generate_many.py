"""Several texts at once and beam search: equal to each text alone and to Hugging Face, on every layout, with their scores."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_gpts import POSITIONS, as_pipeline, build_random_gpt, save_model
from ranks import on_ranks
from reference import GPT2, LLAMA

from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.beam_search import Beam, BeamSearch
from megatron.inference.generate import batch_of_rows, extend_texts, generate_tokens
from megatron.inference.restore import open_pipeline
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText
from megatron.interop.hf_export import export_weights
from megatron.mesh.grid import Grid
from megatron.mesh.mesh import Mesh
from megatron.parallel.packed import supports_packed_weights

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(0.8, 20, 0.9)
PROMPTS = ([5, 99, 17, 3], [8], [40, 41, 42, 43, 44, 45, 46, 47, 1], [5, 99, 17, 3])
COUNT = 12


def generate_together(model, sampling=GREEDY, prompts=PROMPTS, **options) -> list[GeneratedText]:
    texts = [GeneratedText.from_prompt(prompt) for prompt in prompts]
    for _ in extend_texts(as_pipeline(model), texts, **{"max_new_tokens": COUNT, "sampling": sampling, **options}):
        pass
    return texts


def generate_alone(model, prompt, **options) -> list[int]:
    return [*prompt, *generate_tokens(as_pipeline(model), prompt, max_new_tokens=COUNT, sampling=GREEDY, **options)]


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_each_text_of_a_batch_is_that_of_its_prompt_alone(form):
    model = build_random_gpt(form)
    for use_cache in (True, False):
        texts = generate_together(model, use_cache=use_cache)
        assert [text.tokens for text in texts] == [generate_alone(model, prompt) for prompt in PROMPTS]
        assert {text.end for text in texts} == {"length"}
    stop = texts[2].tokens[-4]
    stopped = generate_together(model, stops=lambda text: text.tokens[-1] == stop)
    assert stopped[2].end == "stop" and stopped[2].tokens[-1] == stop
    for short, whole in zip(stopped, texts, strict=True):
        assert short.tokens == whole.tokens[: len(short.tokens)]
        assert stop not in short.tokens[short.start : -1] and (short.end == "stop" or stop not in whole.tokens[whole.start :])


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_weights_arranged_for_generation_change_no_text(form):
    arranged = as_pipeline(build_random_gpt(form))
    arranged.pack_weights()
    for sampling in (GREEDY, SAMPLED):
        expected = [text.tokens for text in generate_together(build_random_gpt(form), sampling)]
        assert [text.tokens for text in generate_together(arranged, sampling)] == expected
    qkv = arranged.stages[0].layers["0"].attention.qkv.weight
    assert hasattr(qkv, "packed") == supports_packed_weights(torch.float32) and qkv.stride() == (1, qkv.shape[0])


def test_sampled_texts_follow_from_the_seed_and_their_place():
    model = build_random_gpt(LLAMA)
    texts = generate_together(model, SAMPLED, seed=3)
    assert texts[0].tokens == [
        *PROMPTS[0],
        *generate_tokens(as_pipeline(model), PROMPTS[0], max_new_tokens=COUNT, sampling=SAMPLED, seed=3),
    ]
    others = generate_together(model, SAMPLED, seed=3, prompts=([9, 9], [8], [7, 6, 5, 4, 3, 2, 1], [5, 99, 17, 3]))
    assert (others[1].tokens, others[3].tokens) == (texts[1].tokens, texts[3].tokens)
    assert texts[0].tokens != texts[3].tokens  # the same prompt at two places
    assert generate_together(model, SAMPLED, seed=3, use_cache=False)[2].tokens == texts[2].tokens


def test_texts_end_at_the_last_position_each_for_itself():
    texts = generate_together(build_random_gpt(GPT2), max_new_tokens=1000)
    assert {len(text.tokens) for text in texts} == {POSITIONS}
    assert list(generate_tokens(as_pipeline(build_random_gpt(GPT2)), [1, 2], max_new_tokens=0, sampling=GREEDY)) == []
    with pytest.raises(ValueError, match="48 tokens, the model 48 positions"):
        generate_together(build_random_gpt(GPT2), prompts=([1], [1] * POSITIONS))


@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_are_the_log_probabilities_of_the_tokens(use_cache):
    model = build_random_gpt(GPT2)
    for count in (COUNT, 0):
        for text in generate_together(model, max_new_tokens=count, top=3, use_cache=use_cache):
            assert text.written == count and len(text.scores) == len(text.tokens) - 1
            expected = (
                model.logits(model.hidden(None, batch_of_rows([text.tokens], model.device))).detach()[:, 0].log_softmax(-1)
            )
            for place, score in enumerate(text.scores):
                best, ids = expected[place].topk(3)
                assert score.log_prob == pytest.approx(float(expected[place, text.tokens[place + 1]]), abs=1e-4)
                assert [token for token, _ in score.top] == ids.tolist()
                assert [value for _, value in score.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert generate_together(model)[0].scores == []


def test_a_long_prompt_is_scored_piece_by_piece(monkeypatch):
    model = build_random_gpt(LLAMA)
    whole = [score.log_prob for score in generate_together(model, top=0)[2].scores]
    monkeypatch.setattr("megatron.inference.prediction.MAX_LOGITS", 3 * 127)
    assert [score.log_prob for score in generate_together(model, top=0)[2].scores] == pytest.approx(whole, abs=1e-5)
    prompts = [PROMPTS[2]]
    assert [s.log_prob for s in generate_together(model, top=0, prompts=prompts)[0].scores] == pytest.approx(whole, abs=1e-4)


def test_banned_tokens_and_a_falling_top_p():
    model = build_random_gpt(GPT2)
    first = generate_together(model)[1].tokens[1]
    without = generate_together(model, banned=lambda last: [first] if last == 8 else [])
    assert without[1].tokens[1] != first and without[2].tokens == generate_together(model)[2].tokens
    logits, generator = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log(), torch.Generator().manual_seed(0)

    def drawn(sampling: Sampling, written: int) -> set[int]:
        return {sampling.choose(logits, generator, written) for _ in range(200)}

    falling = Sampling(top_p=0.9, top_p_decay=0.5, top_p_bound=0.42)
    assert drawn(falling, 0) == {0, 1, 3, 4} and drawn(falling, 1) == {1, 3}
    assert drawn(falling, 9) == {1, 3} and drawn(replace(falling, top_p_bound=0.0), 9) == {1}


# Beam search.


def last_beams(search: BeamSearch, model, **options) -> list[Beam]:
    *_, beams = search.run(as_pipeline(model), PROMPTS[0], **{"max_new_tokens": 16, **options})
    return beams


@pytest.mark.parametrize("form", [GPT2, LLAMA], ids=["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_beams_are_those_of_hugging_face(form, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build_random_gpt(form)
    export_weights(save_model(model, tmp_path), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float().eval()
    prompt = torch.tensor([PROMPTS[0]])
    early, late = (last_beams(BeamSearch(4), model)[0].tokens[at] for at in (1, 9))
    ends = set()
    for width, penalty, stop in ((2, 1.0, None), (4, 1.0, late), (4, 0.0, early), (5, 2.0, early), (3, -1.0, late)):
        text = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=penalty,
            eos_token_id=stop,
            pad_token_id=126,
            return_dict_in_generate=True,
            output_scores=True,
        )
        rows = text.sequences[:, prompt.shape[1] :].tolist()
        for use_cache in (True, False):
            beams = last_beams(BeamSearch(width, penalty, stop), model, use_cache=use_cache)
            assert [[*beam.tokens, *[126] * (len(rows[0]) - len(beam.tokens))] for beam in beams] == rows
            assert [beam.score for beam in beams] == pytest.approx(text.sequences_scores.tolist(), rel=1e-5)
            ends |= {beam.end for beam in beams}
    assert ends == {"stop", "length"}


def test_one_beam_is_the_greedy_text_and_wrong_searches_are_refused():
    model = build_random_gpt(GPT2)
    assert [*PROMPTS[0], *last_beams(BeamSearch(1), model, max_new_tokens=COUNT)[0].tokens] == generate_alone(model, PROMPTS[0])
    for wrong in (dict(width=0), dict(width=1001), dict(width=2, length_penalty=float("nan"))):
        with pytest.raises(ValueError, match="--"):
            BeamSearch(**wrong)
    with pytest.raises(ValueError, match="--beam-width 64 is too wide for a vocabulary of 127"):
        last_beams(BeamSearch(64), model)


# Several processes.


def on_a_layout(root: str, tp: int) -> tuple[list[GeneratedText], list[GeneratedText], list[Beam], int]:
    """Texts with scores, sampled texts, beams, and how many numbers this rank heard of the first pass."""
    import torch.distributed as dist

    model = open_pipeline(root, Mesh.build(Grid(tp=tp, pp=dist.get_world_size() // tp), dist.get_rank())).model
    heard, broadcast = [], model.channels.broadcast
    model.channels.broadcast = lambda x, source: heard.append(x.numel()) or broadcast(x, source)
    next(extend_texts(model, [GeneratedText.from_prompt([1] * 30)], max_new_tokens=1, sampling=GREEDY))
    first = sum(heard)
    return (
        generate_together(model, top=2),
        generate_together(model, SAMPLED, seed=3),
        last_beams(BeamSearch(3, 1.0, 7), model),
        first,
    )


@pytest.mark.parametrize(("form", "tp"), [(GPT2, 1), (LLAMA, 2)], ids=["pp 2", "tp 2"])
def test_a_model_cut_over_ranks_writes_and_searches_the_same(form, tp, tmp_path):
    model = build_random_gpt(form)
    save_model(model, tmp_path)
    texts, sampled, beams = (
        generate_together(model, top=2),
        generate_together(model, SAMPLED, seed=3),
        last_beams(BeamSearch(3, 1.0, 7), model),
    )
    for theirs, theirs_sampled, theirs_beams, first in on_ranks(2, on_a_layout, str(tmp_path), tp):
        assert [text.tokens for text in theirs] == [text.tokens for text in texts]
        assert [text.tokens for text in theirs_sampled] == [text.tokens for text in sampled]
        for mine, other in zip(texts, theirs, strict=True):
            assert [s.log_prob for s in other.scores] == pytest.approx([s.log_prob for s in mine.scores], abs=1e-4)
            assert [[t for t, _ in s.top] for s in other.scores] == [[t for t, _ in s.top] for s in mine.scores]
        assert [beam.tokens for beam in theirs_beams] == [beam.tokens for beam in beams]
        assert [beam.score for beam in theirs_beams] == pytest.approx([beam.score for beam in beams], rel=1e-4)
        assert first == 127  # one row of logits, and not one for each of the prompt's 30 tokens


# The tool.


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    save_model(build_random_gpt(GPT2, vocab=257), root, ByteTokenizer().files())
    main = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "generate.py"))["main"]
    return lambda *flags: main(["--load", str(root), "--device", "cpu", "--max-new-tokens", "9", *flags])


def test_the_tool_writes_several_texts_as_lines_of_json(tool, tmp_path, capsys):
    singles = []
    for prompt in ("Hello", "Good day"):
        assert tool("--prompt", prompt, "--temperature", "0") == 0
        singles.append(capsys.readouterr().out.removesuffix("\n"))
    assert tool("--prompt", "Hello", "--prompt", "Good day", "--temperature", "0") == 0
    lines = capsys.readouterr().out
    told = [json.loads(line) for line in lines.splitlines()]
    assert told == [
        {"prompt": prompt, "text": text, "end": "length"} for prompt, text in zip(("Hello", "Good day"), singles, strict=True)
    ]
    for name, content in (("p.txt", "Hello\n\nGood day\n"), ("p.jsonl", '"Hello"\n{"prompt": "Good day", "id": 3}\n')):
        (tmp_path / name).write_text(content)
        assert tool("--prompt-file", str(tmp_path / name), "--temperature", "0") == 0
        assert capsys.readouterr().out == lines


def test_the_tool_writes_many_texts_in_micro_batches(tool, capsys):
    """Memory does not grow with the number of prompts; what is drawn depends on a prompt's number, and not on the others."""
    asked = [word for prompt in ("Hello", "Good day", "Hello", "x") for word in ("--prompt", prompt)]
    told = []
    for size in ("4", "3", "1"):
        assert tool(*asked, "--micro-batch-size", size, "--seed", "3") == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2] and len(set(told[0].splitlines())) == 4
    assert tool("--prompt", "x", "--prompt", "x" * 48) == 2
    assert capsys.readouterr().err.startswith("error: prompt 2 of 2: the prompt has 48 tokens")


def test_the_tool_searches(tool, capsys):
    assert tool("--prompt", "Hello", "--beam-width", "4", "--length-penalty", "0.5") == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert tool("--prompt", "Hello", "--prompt", "Hello", "--beam-width", "4", "--length-penalty", "0.5") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in told] == [text, text] and told[0]["score"] < 0
    ends = next(character for character in text[5:] if character.isascii())
    assert tool("--prompt", "Hello", "--beam-width", "4", "--length-penalty", "0.5", "--stop-token", str(ord(ends))) == 0
    assert ends not in capsys.readouterr().out[5:].removesuffix("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt x --micro-batch-size 0", "--micro-batch-size 0"),
        ("--prompt x --beam-width 0", "--beam-width 0"),
        ("--prompt x --beam-width 129", "at most half"),
        ("--prompt x --beam-width 2 --temperature 0", "--beam-width chooses nothing at random"),
        ("--prompt x --stop-token 257", "--stop-token 257 is outside"),
        ("--prompt x --length-penalty 2", "--length-penalty belongs to a beam search"),
        ("--prompt-file /nowhere", "--prompt-file /nowhere: No such file"),
    ],
)
def test_the_tool_refuses_bad_requests(tool, flags, message, capsys):
    assert tool(*flags.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n", "has no prompts"),
        ("p.jsonl", '"a"\n{', "line 2 is not JSON"),
        ("p.jsonl", '{"text": "a"}', "line 1 is neither"),
    ],
)
def test_a_wrong_prompt_file_is_refused(tool, name, content, message, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert tool("--prompt-file", str(tmp_path / name)) == 2
    assert message in capsys.readouterr().err
