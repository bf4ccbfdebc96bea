"""Requests of lm-evaluation-harness, without the package: equal to transformers, on one process and led over several."""

import math
import subprocess
import sys

import pytest
import torch
from ranks import on_ranks
from trained_gpt import POSITIONS, Reference, open_on_ranks, sentences, train_and_export

from megatron.data.errors import DataError
from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.sampling import Sampling
from megatron.tasks.leader import LeaderModel, follow_leader
from megatron.tasks.likelihood import Likelihoods
from megatron.tasks.lm_eval import generate_answer, main

pytest.importorskip("transformers")
GREEDY = Sampling(temperature=0.0)
TEXT = " ".join(sentences(6, 3))
PAIRS = [
    ("ma ma", " ma"),
    ("ma ma ", "lo"),
    ("", "ma lo"),
    ("  ", "ma"),
    (TEXT, " tun ma"),
    ("tun", " " + "ma lo " * 6),
    ("lo", " ma"),
]
TEXTS = [TEXT, "m", "", "ma lo tun", "x" * POSITIONS, "x" * (POSITIONS + 1)]
START = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("model"), steps=50)


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


@pytest.fixture(scope="module")
def asked(model):
    return Likelihoods(open_on_ranks(str(model / "run"), 1, 1)[0].model, ByteTokenizer(), POSITIONS, 3)


def answers(asked):
    return (
        asked.score_continuations(PAIRS),
        asked.score_texts(TEXTS),
        [asked.generate_until(p, [" lo", "."], 12, GREEDY) for p in ("ma", "")],
    )


def test_continuations_are_those_of_transformers(asked, reference):
    """After a start token where there is no context; a context that is too long loses its beginning."""
    for (context, continuation), (value, hit) in zip(PAIRS, asked.score_continuations(PAIRS), strict=True):
        guess = reference.tokens(continuation)
        if context.strip():
            before = reference.tokens(context)
        else:
            before, guess = [START], reference.tokens(context + continuation)
        tokens = [*before, *guess][-POSITIONS - 1 :]
        found = [reference.log_prob(tokens[:at], tokens[at]) for at in range(len(tokens) - len(guess), len(tokens))]
        # A space that ends the context is scored with the continuation.
        if context.endswith(" ") and context.strip():
            at = len(tokens) - len(guess) - 1
            found.append(reference.log_prob(tokens[:at], tokens[at]))
        assert value == pytest.approx(sum(v for v, _ in found), abs=1e-4 * len(found))
        assert hit == all(best for _, best in found)
    assert len({hit for _, hit in asked.score_continuations(PAIRS)}) == 2


def test_texts_are_those_of_transformers(asked, reference):
    """Every token once, the first one after the start token; the last window has as much context as any other."""
    for text, value in zip(TEXTS, asked.score_texts(TEXTS), strict=True):
        tokens, total, done = [START, *reference.tokens(text)], 0.0, 1
        while done < len(tokens):
            end = min(done + POSITIONS, len(tokens))
            start = max(0, end - POSITIONS - 1)
            total += sum(reference.log_prob(tokens[start:at], tokens[at])[0] for at in range(done, end))
            done = end
        assert value == pytest.approx(total, abs=1e-4 * max(1, len(tokens)))


def test_text_ends_before_a_stop_string(asked):
    whole = asked.generate_until("ma", [], 12, GREEDY)
    assert len(whole) == 12
    stop = whole[4:6]
    assert asked.generate_until("ma", [stop, ""], 12, GREEDY) == whole[: whole.index(stop)]
    assert len(asked.generate_until("ma " * 30, [], 9, GREEDY)) == 9  # the prompt makes room
    assert len(asked.generate_until("", [], 3, GREEDY)) > 0
    assert generate_answer(asked, "ma", {"until": stop, "max_gen_toks": 12}) == whole[: whole.index(stop)]
    assert generate_answer(asked, "ma", {"max_gen_toks": 5, "do_sample": False, "temperature": 2.0}) == whole[:5]


def led(root, tp, pp):
    opened, mesh = open_on_ranks(root, tp, pp)
    if not mesh.world.first:
        follow_leader(opened.model, mesh.world)
        return None
    leader = LeaderModel(opened.model, mesh.world)
    made = answers(Likelihoods(leader, ByteTokenizer(), POSITIONS, 3))
    leader.finish()
    return made


@pytest.mark.parametrize(("world", "tp", "pp"), [(2, 1, 2), (4, 2, 2)], ids=["pp 2", "tp 2 x pp 2"])
def test_one_rank_leads_the_others(world, tp, pp, asked, model):
    pairs, texts, written_texts = on_ranks(world, led, str(model / "run"), tp, pp)[0]
    alone = answers(asked)
    assert written_texts == alone[2]
    assert texts == pytest.approx(alone[1], abs=1e-4)
    assert [value for value, _ in pairs] == pytest.approx([value for value, _ in alone[0]], abs=1e-4)
    assert [hit for _, hit in pairs] == [hit for _, hit in alone[0]]


def test_requests_that_cannot_be_scored_are_refused(asked, model):
    with pytest.raises(DataError, match="'' has 0 tokens"):
        asked.score_continuations([("ma", "")])
    with pytest.raises(DataError, match="has 41 tokens; it must have 1 to 40"):
        asked.score_continuations([("ma", "x" * 41)])
    with pytest.raises(DataError, match="256 tokens to generate leave no room for a prompt in the 40"):
        generate_answer(asked, "ma", {})
    damaged = open_on_ranks(str(model / "run"), 1, 1)[0].model
    with torch.no_grad():
        damaged.stages[0].embedding.word.weight[ord("m")] = math.nan
    with pytest.raises(DataError, match="not finite"):
        Likelihoods(damaged, ByteTokenizer(), POSITIONS, 3).score_texts(["mama"])


def test_the_program_refuses_what_it_cannot_do(model, tmp_path, monkeypatch, capsys):
    def said(*arguments):
        assert main(["--load", *map(str, arguments)]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1
        return told.err

    monkeypatch.setattr("megatron.tasks.lm_eval.find_spec", lambda name: None)
    assert "pip install -e '.[eval]'" in said(model / "run")
    monkeypatch.setattr("megatron.tasks.lm_eval.find_spec", lambda name: object())
    assert "nowhere" in said(tmp_path / "nowhere")
    assert "start with torchrun --nproc_per_node 2" in said(model / "run", "--tensor-model-parallel-size", 2)
    assert "legal: 1 and above" in said(model / "run", "--pipeline-model-parallel-size", 0)
    assert "is longer than the model" in said(model / "run", "--seq-length", POSITIONS + 1)


def test_lm_eval_runs_as_a_module():
    command = [sys.executable, "-m", "megatron.tasks.lm_eval", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--tensor-model-parallel-size" in done.stdout


def test_the_harness_itself(model, reference, monkeypatch):
    """The installed package finds the model under its name and asks as it asks any other."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from megatron.tasks.lm_eval import register

    register()
    made = get_model("megatron").create_from_arg_string(f"load={model / 'run'}", {"device": "cpu"})
    request = Instance("loglikelihood", {}, ("ma ma", " "), 0)
    ((value, hit),) = made.loglikelihood([request])
    expected, best = reference.log_prob(reference.tokens("ma ma"), ord(" "))
    assert value == pytest.approx(expected, abs=1e-4) and hit == best
