"""Connections that send, read or wait too slowly: they are closed, and others are served meanwhile."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack

import pytest
from serving import Client, Letters, endless_model, served

from megatron.serving.connections import ConnectionLimits

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "x", "max_tokens": 1}'
QUICK = ConnectionLimits(request_timeout=0.4, keep_alive_timeout=0.4, send_timeout=0.4)


def connect(client: Client, *sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=60)
    for piece in sent:
        connection.sendall(piece)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    connection.close()
    return found


@pytest.fixture(scope="module")
def quick():
    with served(endless_model(), Letters(), limits=QUICK) as client:
        yield client


def test_what_is_silent_or_half_sent_is_closed(quick: Client) -> None:
    length = HEAD + b"Content-Length: %d\r\n" % len(BODY)
    silent, half_head, half_body = connect(quick), connect(quick, length), connect(quick, length, b"\r\n", BODY[:-1])
    between = connect(quick, length, b"\r\n", BODY)
    chunks = connect(quick, HEAD, b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    assert read_to_end(silent) == b""
    for half in (half_head, half_body, chunks):
        reply = read_to_end(half)
        assert reply.startswith(b"HTTP/1.1 408 Request Timeout\r\n") and b"--request-timeout" in reply
    answered = read_to_end(between)  # keeps its connection after a reply, and then says nothing
    assert answered.startswith(b"HTTP/1.1 200 OK\r\n") and b'"usage"' in answered


def test_connections_that_trickle_are_closed(quick: Client) -> None:
    """Each byte comes in time, the whole does not; also where a refusal has been sent and the body goes on."""
    refused = connect(quick, HEAD.replace(b"localhost", b"evil.example"), b"Content-Length: 1000\r\n\r\n")
    head, body = connect(quick), connect(quick, HEAD, b"Content-Length: 1000\r\n\r\n")
    going = {head, body, refused}
    for i in range(200):
        for connection in tuple(going):
            try:
                connection.sendall(HEAD[i % len(HEAD) :][:1] if connection is head else b" ")
            except OSError:  # a broken pipe, or reset
                going.discard(connection)
                connection.close()
        if not going:
            break
        time.sleep(0.05)
    assert not going


def test_many_idle_connections_do_not_keep_others_out() -> None:
    """200 half-sent requests where 40 connections may be: the oldest go, requests that run stay and new ones are answered."""
    limits = ConnectionLimits(max_connections=40)
    endless = {"prompt": "x", "max_tokens": 11000, "temperature": 0, "stream": True}
    with served(endless_model(), Letters(), limits=limits) as client, ExitStack() as closing:
        running = closing.enter_context(client.connected(endless))
        assert b"200" in running.recv(100)
        for _ in range(200):
            closing.enter_context(connect(client, HEAD))
        assert client("GET", "/health") == (200, {"status": "ok"})
        assert running.recv(100)


def test_requests_that_run_fill_the_server() -> None:
    limits = ConnectionLimits(max_connections=1)
    endless = {"prompt": "x", "max_tokens": 11000, "temperature": 0, "stream": True}
    with served(endless_model(), Letters(), limits=limits) as client, client.connected(endless) as running:
        assert b"200" in running.recv(100)
        reply = read_to_end(connect(client))
        assert reply.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"--max-connections" in reply


def test_a_client_that_stops_reading_loses_its_stream() -> None:
    """Its request ends, so that the next one runs. The system keeps little of a reply here, so that most lies in the server."""
    endless = json.dumps({"prompt": "x", "max_tokens": 1200, "temperature": 0, "stream": True, "n": 8}).encode()
    with served(endless_model(), Letters(), limits=QUICK, buffer=4096) as client, socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", client.port))
        stuck.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(endless) + endless)
        deadline = time.monotonic() + 60
        while not any("--send-timeout" in line for line in client.log) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any("the reply was read too slowly for 0.4 s (--send-timeout)" in line for line in client.log)
        assert client.complete(prompt="Hello", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_what_is_no_http_is_answered_in_words(quick: Client) -> None:
    quick.log.clear()
    for sent, status, words in (
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "illegal request line"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000, 431, "too long"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "illegal chunk"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "Content-Length"),
    ):
        head, _, body = read_to_end(connect(quick, sent)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status) and words in json.loads(body)["error"]["message"]
    told = [line for line in quick.log if "the request is not valid HTTP" in line]
    assert len(told) == 5 and all(line.isprintable() for line in told)
    upgraded = read_to_end(
        connect(quick, b"GET /health HTTP/1.1\r\nHost: x.y\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    )
    assert upgraded.startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("name", ["request_timeout", "keep_alive_timeout", "send_timeout", "max_connections"])
def test_limits_that_allow_nothing_are_refused(name: str) -> None:
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value} is no limit"):
            ConnectionLimits(**{name: value})
