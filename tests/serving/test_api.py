"""The HTTP routes over a small model in this process: replies equal what generation writes, wrong requests are refused."""

from __future__ import annotations

import threading
import time

import pytest
from random_gpts import as_pipeline, build_random_gpt
from reference import GPT2, LLAMA
from serving import VOCAB, Letters, endless_model, served

from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.beam_search import BeamSearch
from megatron.inference.generate import extend_texts
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText
from megatron.serving.detokenize import added_text, token_width
from megatron.serving.fields import Fields
from megatron.serving.megatron_api import read_task

TOKENIZER = Letters()


def texts(model, prompts, count=8, sampling=None, **options) -> list[GeneratedText]:
    """Generate from a batch of prompts, without a server."""
    found = [GeneratedText.from_prompt(TOKENIZER.tokenize(prompt)) for prompt in prompts]
    ends = lambda text: text.tokens[-1] == 256  # noqa: E731
    for _ in extend_texts(
        as_pipeline(model), found, max_new_tokens=count, sampling=sampling or Sampling(0.0), stops=ends, **options
    ):
        pass
    return found


def words(text: GeneratedText) -> str:
    return TOKENIZER.detokenize(text.tokens[text.start :]).removesuffix("<|endoftext|>")


@pytest.fixture(scope="module")
def model():
    return endless_model()


@pytest.fixture(scope="module")
def client(model):
    with served(model, TOKENIZER) as client:
        yield client


def test_megatron_request(client, model):
    found = texts(model, ("Hello", "Go"), top=0)
    asked = {"prompts": ["Hello", "Go"], "tokens_to_generate": 8, "top_k": 1, "logprobs": True}
    for method in ("PUT", "POST"):
        status, reply = client(method, "/api", asked)
        assert status == 200 and reply.keys() == {"text", "segments", "logprobs"}
        assert reply["text"] == [TOKENIZER.detokenize(text.tokens) for text in found]
        assert reply["segments"] == [[TOKENIZER.detokenize([t]) for t in text.tokens] for text in found]
        for row, text in zip(reply["logprobs"], found, strict=True):
            assert row == pytest.approx([score.log_prob for score in text.scores], abs=1e-4)
    status, reply = client("PUT", "/api", {"prompts": ["Hello"], "top_k": 1})
    assert status == 200 and reply["logprobs"] is None and len(reply["segments"][0]) == 5 + 64
    status, reply = client("PUT", "/api", {"prompts": ["Hello"], "tokens_to_generate": 0, "logprobs": True})
    assert reply["text"] == ["Hello"] and len(reply["logprobs"][0]) == 4


def test_megatron_sampling_and_seeds(client, model):
    (expected,) = texts(model, ["Hello"], sampling=Sampling(0.7, 0, 0.9, 0.9, 0.5), seed=11)
    asked = {"prompts": ["Hello"], "tokens_to_generate": 8, "temperature": 0.7, "top_p": 0.9, "random_seed": 11}
    asked |= {"top_p_decay": 0.9, "top_p_bound": 0.5}
    assert client("PUT", "/api", asked)[1]["text"] == [TOKENIZER.detokenize(expected.tokens)]
    free = {"prompts": ["Hello"], "tokens_to_generate": 20}
    assert client("PUT", "/api", free)[1]["text"] != client("PUT", "/api", free)[1]["text"]  # no seed: each time another


def test_megatron_beams(client, model):
    *_, beams = BeamSearch(3, 0.5, 65).run(as_pipeline(model), TOKENIZER.tokenize("Hello"), max_new_tokens=8)
    asked = {"prompts": ["Hello"], "tokens_to_generate": 8, "beam_width": 3, "length_penalty": 0.5, "stop_token": 65}
    status, reply = client("PUT", "/api", asked)
    assert status == 200 and reply.keys() == {"text", "segments", "scores"}
    assert reply["text"] == ["Hello" + TOKENIZER.detokenize(beam.tokens) for beam in beams]
    assert reply["scores"] == pytest.approx([beam.score for beam in beams], rel=1e-5)


def test_megatron_stops_and_bans(model):
    (whole,) = texts(model, ["Hello:"], 20)
    first = whole.tokens[6:].index(whole.tokens[12]) + 1
    asked = {"prompts": ["Hello:"], "tokens_to_generate": 20, "top_k": 1}
    with served(model, Letters(newline=whole.tokens[12])) as client:
        (line,) = client("PUT", "/api", {**asked, "stop_on_eol": True})[1]["segments"]
        assert len(line) == 6 + first and line[-1] == "\n"
        (paragraph,) = client("PUT", "/api", {**asked, "stop_on_double_eol": True})[1]["segments"]
        assert len(paragraph) > len(line) and paragraph[-2:] == ["\n", "\n"] and "\n\n" not in "".join(paragraph[:-1])
        (bos,) = client("PUT", "/api", {**asked, "prompts": [""], "add_BOS": True, "tokens_to_generate": 3})[1]["segments"]
        assert bos[0] == "<|endoftext|>" and len(bos) == 4
    with served(model, Letters(newline=whole.tokens[6])) as client:
        (free,) = client("PUT", "/api", asked)[1]["segments"]
        (kept,) = client("PUT", "/api", {**asked, "prevent_newline_after_colon": True})[1]["segments"]
        assert free[6] == "\n" != kept[6]
        (searched,) = client("PUT", "/api", {**asked, "prevent_newline_after_colon": True, "beam_width": 1})[1]["segments"]
        assert searched == kept


def test_two_ends_of_lines_in_a_row():
    fields = Fields(b'{"prompts": ["x"], "stop_on_double_eol": true}')
    stops = read_task(fields, TOKENIZER).stops(TOKENIZER)
    assert [stops(GeneratedText([*tokens], 1)) for tokens in ([9, 10], [10, 10], [10, 9, 10], [9, 256])] == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": None}, "prompts must be given"),
        ({"prompts": "Hello"}, "prompts must be given, as a list"),
        ({"prompts": []}, "there are 0 prompts"),
        ({"prompts": ["x"] * 129}, "there are 129 prompts; legal: 1 to 128"),
        ({"prompts": [""]}, "needs add_BOS"),
        ({"max_len": 3}, "max_len is no longer a field: use tokens_to_generate"),
        ({"sentences": ["x"]}, "use prompts"),
        ({"tokens_to_generat": 3}, "tokens_to_generat is not a field"),
        ({"tokens_to_generate": -1}, "tokens_to_generate must be a whole number at least 0"),
        ({"tokens_to_generate": 1.5}, "tokens_to_generate must be a whole number"),
        ({"tokens_to_generate": 0}, "only makes sense with logprobs"),
        ({"tokens_to_generate": 20000}, "allows 12000"),
        ({"logprobs": 1}, "logprobs must be true or false"),
        ({"temperature": 0}, "temperature must be a number above 0 to 100"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": 101}, "temperature must be a number"),
        ({"top_k": 1001}, "top_k must be a whole number from 0 to 1000"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"top_p": 1.1}, "top_p must be a number from 0 to 1"),
        ({"top_p": 0.5, "top_k": 2}, "exclude each other"),
        ({"top_p_decay": 0.5}, "top_p_decay needs top_p"),
        ({"top_p_bound": 0.5}, "top_p_bound needs top_p"),
        ({"top_p": 0.5, "top_p_bound": 0.6}, "top_p_bound must be a number above 0 to 0.5"),
        ({"random_seed": -1}, "random_seed must be a whole number"),
        ({"no_log": "yes"}, "no_log must be true or false"),
        ({"beam_width": 0}, "beam_width must be a whole number from 1"),
        ({"beam_width": 150}, "more than half of the 257 tokens"),
        ({"beam_width": 2, "prompts": ["a", "b"]}, "beam_width is for one prompt"),
        ({"beam_width": 2, "length_penalty": "x"}, "length_penalty must be a number"),
        ({"beam_width": 2, "stop_token": "x"}, "stop_token must be a whole number"),
        ({"beam_width": 2, "stop_token": 50256}, "stop_token 50256 is outside of the vocabulary of 257"),
    ],
)
def test_wrong_megatron_requests(client, fields, message):
    status, reply = client("PUT", "/api", {"prompts": ["Hello"], **fields})
    assert status == 400 and isinstance(reply, str) and message in reply


def test_bodies_that_are_no_json_are_refused(client):
    for body, message in (
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"prompts": ["\\ud800"]}', "not JSON"),
        (b'{"prompts": ["x"], "tokens_to_generate": 1, "prompts": ["y"]}', "the field 'prompts' more than once"),
        (b'{"prompt": "x", "stream_options": {"include_usage": true, "include_usage": false}}', "'include_usage' more than"),
        (b"[" * 100_000, "not JSON"),
    ):
        status, reply = client("PUT", "/api", body)
        assert status == 400 and message in reply
        status, reply = client("POST", "/v1/completions", body)
        assert status == 400 and message in reply["error"]["message"]
    assert client("PUT", "/api", b" " * ((16 << 20) + 1))[0] == 413
    assert client("GET", "/api")[0] == 405 and client("GET", "/nothing")[0] == 404


def test_completions_equal_generation_without_a_server(client, model):
    for prompt in ("Hello", list(b"Hello")):
        reply = client.complete(prompt=prompt, max_tokens=8, temperature=0, model="tiny")
        (expected,) = texts(model, ["Hello"])
        (choice,) = reply["choices"]
        assert choice == {"text": words(expected), "index": 0, "logprobs": None, "finish_reason": "length"}
        assert reply["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
        assert reply["object"] == "text_completion" and reply["model"] == "tiny" and reply["id"].startswith("cmpl-")
    several = client.complete(prompt=["Hello", "Go"], n=2, max_tokens=8, seed=5)
    expected = texts(model, ("Hello", "Hello", "Go", "Go"), sampling=Sampling(), seed=5)
    assert [choice["text"] for choice in several["choices"]] == [words(text) for text in expected]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"]["prompt_tokens"] == 7 and len({choice["text"] for choice in several["choices"]}) == 4
    assert len(client.complete(prompt=[[1, 2], [3]])["choices"]) == 2


def test_the_end_of_a_document_ends_a_text():
    eager = build_random_gpt(LLAMA, vocab=VOCAB)
    expected = texts(eager, ("Hello", "Hello", "Go", "Go"), sampling=Sampling(), seed=5)
    with served(eager, TOKENIZER) as client:
        reply = client.complete(prompt=["Hello", "Go"], n=2, max_tokens=8, seed=5, logprobs=0)
    assert [choice["text"] for choice in reply["choices"]] == [words(text) for text in expected]
    for choice, text in zip(reply["choices"], expected, strict=True):  # the end itself is not shown, but has its own
        assert choice["logprobs"]["tokens"] == [TOKENIZER.letter(token) for token in text.tokens[text.start :]]
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["text_offset"]) == text.written
    ends = [choice["finish_reason"] for choice in reply["choices"]]
    assert ends == [text.end for text in expected] == ["length", "length", "length", "stop"]
    assert reply["usage"]["completion_tokens"] == sum(text.written for text in expected) < 32


def test_stops_of_completions(client, model):
    (whole,) = texts(model, ["Hello"], 20)
    text = words(whole)
    stop = text[7:9]
    (choice,) = client.complete(prompt="Hello", max_tokens=20, temperature=0, stop=stop)["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    many = [*(f"never {i}" for i in range(500)), "n" * 5000, stop, text[7:10]]  # lm-evaluation-harness sends five and more
    assert client.complete(prompt="Hello", max_tokens=20, temperature=0, stop=many)["choices"][0]["text"] == choice["text"]
    pieces = client.events(prompt="Hello", max_tokens=20, temperature=0, stop=many)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == "stop"


def test_log_probs_of_completions(client, model):
    (text,) = texts(model, ["Hello"], 3, top=2)
    asked = dict(prompt="Hello", max_tokens=3, temperature=0, logprobs=2)
    told = client.complete(**asked, echo=True)["choices"][0]
    assert told["text"] == "Hello" + words(text)
    found = told["logprobs"]
    assert found["tokens"] == list(told["text"]) and found["text_offset"] == list(range(8))
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx([score.log_prob for score in text.scores], abs=1e-4)
    best = [max(alternatives.values()) for alternatives in found["top_logprobs"][1:]]
    assert best == pytest.approx([score.top[0][1] for score in text.scores], abs=1e-4)
    short = client.complete(**asked)["choices"][0]["logprobs"]
    assert short["tokens"] == found["tokens"][5:] and short["text_offset"] == [0, 1, 2]
    assert short["token_logprobs"] == pytest.approx(found["token_logprobs"][5:])
    pieces = client.events(**asked, echo=True)
    assert [t for piece in pieces for t in piece["choices"][0]["logprobs"]["tokens"]] == found["tokens"]
    read = client.complete(prompt="Hello", max_tokens=0, echo=True, logprobs=0)
    assert read["choices"][0]["text"] == "Hello" and read["usage"]["completion_tokens"] == 0
    assert read["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(found["token_logprobs"][1:5], abs=1e-5)


def test_a_stream_is_the_whole_reply_in_pieces(client):
    asked = dict(prompt=["Hello", "Go on"], n=2, max_tokens=6, seed=3, temperature=0.8)
    whole = client.complete(**asked)
    *pieces, last = client.events(**asked, stream_options={"include_usage": True})
    told = {index: "" for index in range(4)}
    for piece in pieces:
        (choice,) = piece["choices"]
        told[choice["index"]] += choice["text"]
    assert list(told.values()) == [choice["text"] for choice in whole["choices"]]
    assert len(pieces) == whole["usage"]["completion_tokens"] > 12
    assert last["choices"] == [] and last["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1.5]}, 400, "prompt"),
        ({"prompt": ""}, 400, None),
        ({"prompt": [999]}, 400, None),
        ({"model": "other"}, 404, "model"),
        ({"n": 0}, 400, "n"),
        ({"n": 129}, 400, "n"),
        ({"n": 2, "best_of": 3}, 400, "best_of"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"logprobs": 101}, 400, "logprobs"),
        ({"stop": ["a", ""]}, 400, "stop"),
        ({"stop": 5}, 400, "stop"),
        ({"stream": False, "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"stream_options": {"include_obfuscation": True}}, 400, "stream_options"),
        ({"user": 5}, 400, "user"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"stream_options": 3}, 400, "stream_options"),
        ({"promt": "x"}, 400, "promt"),
        ({"max_tokens": 20000}, 400, None),
    ],
)
def test_wrong_completion_requests_are_refused(client, fields, status, param):
    for stream in (False, True):
        found, reply = client("POST", "/v1/completions", {"prompt": "Hello", "stream": stream, **fields})
        assert found == status and reply["error"]["param"] == param
        assert reply["error"]["type"] == "invalid_request_error" and reply["error"]["message"]


def test_small_routes_and_the_log(client):
    assert client("GET", "/health") == (200, {"status": "ok"})
    listed = client("GET", "/v1/models")[1]
    assert listed["object"] == "list" and listed["data"][0]["id"] == "tiny"
    client.log.clear()
    client("PUT", "/api", {"prompts": ["secret"], "tokens_to_generate": 1})
    client("PUT", "/api", {"prompts": ["secret"], "tokens_to_generate": 1, "no_log": True})
    assert len(client.log) == 1 and "PUT /api: status 200" in client.log[0] and "secret" not in client.log[0]


def test_a_model_with_few_positions_says_what_fits():
    with served(build_random_gpt(GPT2, vocab=VOCAB), TOKENIZER) as client:
        status, reply = client("PUT", "/api", {"prompts": ["Hello", "x"], "tokens_to_generate": 44})
        assert status == 400 and "48 positions" in reply and "ask for 43 at most" in reply
        assert client("PUT", "/api", {"prompts": ["Hello"], "tokens_to_generate": 43})[0] == 200


def test_a_damaged_model_fails_each_request_and_not_the_server():
    damaged = build_random_gpt(LLAMA, vocab=VOCAB)
    damaged.head.weight.data[5] = float("nan")
    with served(damaged, TOKENIZER) as client:
        for _ in range(2):
            status, reply = client("POST", "/v1/completions", {"prompt": "x"})
            assert status == 500 and "not finite" in reply["error"]["message"] and reply["error"]["type"] == "server_error"
        assert "not finite" in client.events(prompt="x")[-1]["error"]["message"]


def test_requests_queue_for_room_and_one_whose_client_leaves_ends(model):
    """A request for a text that would take minutes is cut off, as a stream and without, and gives its room to the next."""
    with served(model, TOKENIZER, cache_tokens=12000) as client:
        for stream in (True, False):
            with client.connected({"prompt": "x", "max_tokens": 11000, "temperature": 0, "stream": stream}) as leaving:
                if stream:
                    assert b"200" in leaving.recv(100)
                time.sleep(0.3)
                behind, done = [], threading.Event()

                def ask(found=behind, done=done):
                    found.append(client.complete(prompt="Hello", max_tokens=2000, stop="e"))
                    done.set()

                threading.Thread(target=ask).start()
                assert not done.wait(0.4)
                # What finds room beside the first does not wait for the second.
                assert client.complete(prompt="Hello", max_tokens=2)["usage"]["completion_tokens"] == 2
                assert not done.is_set()
            assert done.wait(15) and len(behind) == 1


def test_waiting_requests_are_refused_at_the_end(model):
    found = []
    with served(model, TOKENIZER) as client:
        asking = [
            threading.Thread(
                target=lambda: found.append(
                    client("POST", "/v1/completions", {"prompt": "x", "max_tokens": 11000, "temperature": 0})
                )
            )
            for _ in range(2)
        ]
        for thread in asking:
            thread.start()
        time.sleep(0.5)
    for thread in asking:
        thread.join(10)
    assert [(status, reply["error"]["message"]) for status, reply in found] == [(503, "the server is stopping")] * 2


def test_text_appears_only_when_it_is_certain():
    byte = ByteTokenizer()
    tokens = list("né €!".encode())
    assert [token_width(byte, tokens, i) for i in range(8)] == [1, 0, 1, 1, 0, 0, 1, 1]
    assert added_text(byte, tokens, 1) == "é €!" and added_text(byte, tokens, 2) == "é €!"
