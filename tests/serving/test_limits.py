"""No client brings the server down: its next request is answered, and its log says what came."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
from unittest.mock import patch

import pytest
import torch
from random_gpts import as_pipeline
from serving import Letters, endless_model, served

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def client():
    with served(endless_model(), Letters()) as client:
        yield client


def wait_for_log_line(client, what: str) -> str:
    """The log's only line, once it is there."""
    deadline = time.monotonic() + 10
    while not client.log and time.monotonic() < deadline:
        time.sleep(0.01)
    (line,) = client.log
    assert what in line
    return line


def wait_for_unhealthy(client) -> str:
    """Wait until /health says that something is wrong, and return its words."""
    deadline = time.monotonic() + 30
    while (found := client("GET", "/health"))[0] == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    status, said = found
    assert (status, said["status"]) == (503, "stuck")
    return str(said["message"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 10**4299, "prompt": ["x"] * 100}, "max_tokens"),  # as many digits as Python reads, and no room for more
        ({"stop": "x" * 65537}, "stop"),  # each character takes memory while the request runs
    ],
)
def test_sizes_without_end_are_refused(client, fields, param):
    status, reply = client("POST", "/v1/completions", {"prompt": "x", **fields})
    assert status == 400 and reply["error"]["param"] == param


def test_a_body_that_cannot_fit_does_not_become_tokens():
    """The tokenizer would hold up every other request, and on several ranks the watch, for as long as it takes."""
    with served(endless_model(), Letters(), max_tokens_total=100) as client:
        for size, expected in ((68_000, 400), (69_000, 413)):
            status, reply = client("PUT", "/api", {"prompts": ["x" * size]})
            assert status == expected and "--max-tokens-to-oom" in reply


def test_a_client_that_goes_before_it_has_said_all(client):
    client.log.clear()
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.sendall(HEAD + b"Content-Length: 999\r\n\r\n{")
        time.sleep(0.1)
    wait_for_log_line(client, "status 499, the client has gone")


def test_a_line_of_the_log_is_one_line_whatever_is_sent(client):
    client.log.clear()
    client("POST", "/v1/completions", {"prompt": "x", "\n10.0.0.1 PUT /api: status 200\x1b[2J" + "y" * 1000: 1})
    line = wait_for_log_line(client, "?10.0.0.1 PUT")
    assert line.isprintable() and len(line) < 400


def test_a_wrong_method_is_told_the_right_ones(client):
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.open("GET", "/v1/completions")
    assert refused.value.code == 405 and refused.value.headers["allow"] == "POST"
    refused.value.close()


def test_no_room_has_a_status_also_before_a_stream():
    with served(endless_model(), Letters(), max_waiting=1, cache_tokens=12000) as client:
        endless = {"prompt": "x", "max_tokens": 11000, "temperature": 0, "stream": True}
        with client.connected(endless) as running:
            assert b"200" in running.recv(100)
            time.sleep(0.2)
            with client.connected(endless):
                time.sleep(0.2)
                for stream in (True, False):
                    status, reply = client("POST", "/v1/completions", {"prompt": "x", "stream": stream})
                    assert status == 503 and "1 requests wait already" in reply["error"]["message"]


def test_health_tells_when_the_model_is_stuck():
    """A pass that does not come back for long. When it does, requests are answered again."""
    model, go_on, asked = as_pipeline(endless_model()), threading.Event(), {"prompt": "x", "max_tokens": 3}
    predict = model.predict

    def stalled(pieces, top=0):
        go_on.wait(60)
        return predict(pieces, top)

    model.predict = stalled
    with served(model, Letters(), patience=0.2) as client:
        assert client("GET", "/health") == (200, {"status": "ok"})
        with client.connected(asked):
            assert "no progress for 0 s, while computing 1 texts of 1 requests" in wait_for_unhealthy(client)
            go_on.set()
            assert client.complete(**asked)["usage"]["completion_tokens"] == 3
            assert client("GET", "/health")[0] == 200
    assert client.engine.trouble(60.0) == "the server is stopping"


def test_health_tells_when_another_rank_is_gone():
    """Rank 0 then waits in the exchange between two requests, which comes at every beat."""
    with patch("megatron.serving.engine.MAX_IDLE", 0.3), served(endless_model(), Letters()) as client:
        exchange, go_on = client.engine.control.exchange, threading.Event()

        def blocked(*told, **asked):
            go_on.wait(60)
            return exchange(*told, **asked)

        client.engine.control.exchange = blocked
        assert "while waiting for a request" in wait_for_unhealthy(client)
        go_on.set()


def test_too_little_memory_ends_the_request_and_not_the_server():
    model = as_pipeline(endless_model())
    predict = model.predict

    def short(pieces, top=0):
        if sum(piece.rows * piece.count for piece in pieces) > 3:
            raise torch.OutOfMemoryError("no memory")
        return predict(pieces, top)

    model.predict = short
    with served(model, Letters()) as client:
        status, reply = client("PUT", "/api", {"prompts": ["Hello"], "tokens_to_generate": 1})
        assert status == 500 and "--max-tokens-to-oom" in reply
        assert client("PUT", "/api", {"prompts": ["Hi"], "tokens_to_generate": 1})[0] == 200
