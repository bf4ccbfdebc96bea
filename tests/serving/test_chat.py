"""Chats: conversations become what transformers makes of them, replies have OpenAI's form, and templates are kept in bounds."""

from __future__ import annotations

import json

import pytest
from chats import CHATML, EOS, GEMMA, IM_END, INST, VOCAB, open_tokenizer, write_tokenizer
from random_gpts import as_pipeline, build_random_gpt
from reference import LLAMA
from serving import Letters, endless_model, served

from megatron.data.errors import DataError
from megatron.inference.generate import extend_texts
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText
from megatron.serving import chat_template
from megatron.serving.chat_template import ChatFiles, ChatTemplate
from megatron.serving.fields import RequestError

TALKS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be kind "}, {"role": "user", "content": " What is <b>1 & 1</b>?\n"}],
    [
        {"role": "user", "content": "1 + 1 \u4e1c</s>"},
        {"role": "assistant", "content": "2 "},
        {"role": "user", "content": "\U0001f642"},
    ],
)
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"q": "\u00e9"}'}}]
WITH_TOOLS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "content": "22", "tool_call_id": "1"},
]


def open_chat_template(folder, max_characters=100_000, **about) -> ChatTemplate:
    tokenizer = open_tokenizer(write_tokenizer(folder, **about))
    return ChatTemplate(ChatFiles.from_directory(folder, tokenizer), tokenizer, max_characters)


def reply_in(client, **fields):
    status, body = client("POST", "/v1/chat/completions", {"messages": TALKS[0], "temperature": 0, **fields})
    assert status == 200, body
    return body


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    chat = open_chat_template(tmp_path_factory.mktemp("chat"))
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def model():
    return build_random_gpt(LLAMA, vocab=VOCAB)


@pytest.fixture(scope="module")
def client(model, chat):
    with served(model, chat.tokenizer, chat=chat) as client:
        yield client


@pytest.mark.parametrize(
    ("template", "talks", "as_file"), [(CHATML, (*TALKS, WITH_TOOLS), True), (INST, TALKS, False), (GEMMA, TALKS, True)]
)
def test_a_conversation_is_what_transformers_makes_of_it(tmp_path, template, talks, as_file) -> None:
    from transformers import PreTrainedTokenizerFast

    chat = open_chat_template(tmp_path, template=template, as_file=as_file)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for talk in talks:
        plain = [{name: value for name, value in message.items() if value is not None} for message in talk]
        assert chat.text(plain) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        told = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(chat.tokens(plain)) == told
    chat.close()


def test_a_reply_is_what_the_model_writes_after_it(client, model, chat) -> None:
    text = GeneratedText.from_prompt(chat.tokens(TALKS[0]))
    for _ in extend_texts(as_pipeline(model), [text], max_new_tokens=6, sampling=Sampling(0.0)):
        pass
    words = chat.tokenizer.detokenize(text.tokens[text.start :])
    for limit in ("max_tokens", "max_completion_tokens"):
        body = reply_in(client, **{limit: 6})
        assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "tiny"
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": words, "refusal": None}
        assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
        assert body["usage"] == {"prompt_tokens": text.start, "completion_tokens": 6, "total_tokens": text.start + 6}
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert reply_in(client, messages=parts, max_tokens=1)["usage"]["prompt_tokens"] == text.start + 1  # a new line between
    told = reply_in(client, max_tokens=6, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(told) == 6 and all(row["logprob"] == row["top_logprobs"][0]["logprob"] for row in told)  # the most probable


def test_a_stream_of_chunks_is_the_whole_reply(client) -> None:
    asked = dict(messages=TALKS[1], max_tokens=6, n=2, temperature=0.9, seed=3, stop=["Q", "q", "xx", "yy", "zz", "ww"])
    whole = reply_in(client, **asked)
    with client.open(
        "POST", "/v1/chat/completions", {**asked, "stream": True, "stream_options": {"include_usage": True}}
    ) as reply:
        *pieces, done, rest = reply.read().decode().split("\n\n")
    chunks = [json.loads(piece.removeprefix("data: ")) for piece in pieces]
    assert (done, rest) == ("data: [DONE]", "") and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    *told, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"] and all(chunk["usage"] is None for chunk in told)
    for index in range(2):
        own = [chunk["choices"][0] for chunk in told if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}
        ends = [choice["finish_reason"] for choice in own]
        assert ends == [None] * (len(own) - 1) + [whole["choices"][index]["finish_reason"]]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == whole["choices"][index]["message"]["content"]


def test_every_token_that_the_files_name_ends_a_reply(tmp_path, model) -> None:
    """Eos of the tokenizer, and those of generation_config.json, which lists several."""
    folder = write_tokenizer(tmp_path)
    tokenizer = open_tokenizer(folder)
    assert ChatFiles.from_directory(folder, tokenizer).ends == (EOS,)
    text = GeneratedText.from_prompt(tokenizer.tokenize("Hi"))
    for _ in extend_texts(as_pipeline(model), [text], max_new_tokens=4, sampling=Sampling(0.0)):
        pass
    third = text.tokens[text.start + 2]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [IM_END, third, True, -1, "x"]}))
    files = ChatFiles.from_directory(folder, tokenizer)
    assert files.ends == (EOS, IM_END, third)
    kept = folder / chat_template.KEPT  # as an import keeps the files, which then come first
    kept.mkdir()
    (folder / "generation_config.json").rename(kept / "generation_config.json")
    assert ChatFiles.from_directory(folder, tokenizer) == files
    (kept / "chat_template.jinja").write_text("kept")
    assert ChatFiles.from_directory(folder, tokenizer).template == "kept"
    chat = ChatTemplate(files, tokenizer, 1000)
    with served(model, tokenizer, chat=chat) as client:
        choice = client.complete(prompt="Hi", max_tokens=4, temperature=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (tokenizer.detokenize(text.tokens[text.start : -2]), "stop")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": None}, "messages", "as a list of objects"),
        ({"messages": []}, "messages", "as a list of objects"),
        ({"messages": ["x"]}, "messages", "messages[0] must be an object"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "messages[0].role must be one of system"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages", "messages[0].role must be one of"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content must be given"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "messages[0].content must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "messages[0].content[0] must"),
        ({"messages": [{"role": "user", "content": "x", "contents": 1}]}, "messages", "contents is not a field"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages", "name must be a string"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages", "tool_calls must be a list"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "they differ"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "must be a whole number"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": 1}, "logprobs", "must be true or false"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not offered"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not offered"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "applies only to streams"),
        ({"prompt": "x"}, "prompt", "prompt is not a field"),
        ({"metadata": 1}, "metadata", "must be an object"),
        ({"max_tokens": 20_000}, None, "allows 12000"),
    ],
)
def test_wrong_chat_requests_are_refused(client, fields, param, words) -> None:
    status, body = client("POST", "/v1/chat/completions", {"messages": TALKS[0], **fields})
    assert status == 400 and body["error"]["param"] == param and words in body["error"]["message"]


def test_chats_without_a_template_are_refused(tmp_path) -> None:
    chat = open_chat_template(tmp_path, template=None)
    for held in ({"chat": chat}, {}):
        with served(endless_model(), Letters(), **held) as client:
            status, body = client("POST", "/v1/chat/completions", {"messages": TALKS[0]})
            assert status == 400 and "--chat-template FILE" in body["error"]["message"]
    given = ChatTemplate(ChatFiles.from_directory(tmp_path, chat.tokenizer, "{{ messages[0].content }}"), chat.tokenizer, 1000)
    assert given.text(TALKS[0]) == "Hi"
    given.close()


BAD = (
    ("{{ raise_exception('no system here') }}", "no system here"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ namespace(__class__=1) }}", "cannot be stored"),
    ("{{ range(1000000) | list }}", "Range too big"),
    ("{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "needs too much mem"),
    ("{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 9 }}{% endfor %}", "longer than 1000 characters"),
    ("{{ messages[0].nothing.at_all }}", "has no attribute"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "did not end within 0.7 s"),
)


def test_a_template_is_kept_in_bounds(tmp_path, monkeypatch) -> None:
    """It ends with words, and so that the next conversation is answered."""
    cases = "".join(f"{{% elif messages[0].content == '{i}' %}}{bad}" for i, (bad, _) in enumerate(BAD))
    chat = open_chat_template(
        tmp_path, template="{% if messages[0].content == 'ok' %}fine" + cases + "{% endif %}", max_characters=1000
    )
    for i, (_, words) in enumerate(BAD):
        monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.7 if "did not" in words else 60.0)
        with pytest.raises(RequestError, match=words):
            chat.text([{"role": "user", "content": str(i)}])
        monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 60.0)
        assert chat.text([{"role": "user", "content": "ok"}]) == "fine"
    chat.close()


def test_files_that_hold_no_template(tmp_path, monkeypatch) -> None:
    broken = open_chat_template(tmp_path / "broken", template="{% if %}")
    with pytest.raises(RequestError, match=r"chat template cannot be used.*--chat-template FILE"):
        broken.text(TALKS[0])
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    folder = write_tokenizer(tmp_path / "named", None, chat_template=named)
    tokenizer = open_tokenizer(folder)
    assert ChatFiles.from_directory(folder, tokenizer).template == "d"
    monkeypatch.setattr(chat_template, "MAX_TEMPLATE_LENGTH", 10)
    jinja = folder / "chat_template.jinja"
    for content, words in ((b"x" * 11, "more than the 10"), (b"\xff", "not text in UTF-8")):
        jinja.write_bytes(content)
        with pytest.raises(DataError, match=words):
            ChatFiles.from_directory(folder, tokenizer)
    jinja.unlink()
    jinja.mkdir()
    with pytest.raises(DataError, match="directory"):
        ChatFiles.from_directory(folder, tokenizer)
