"""A server in this process, on a free port, and a client for it."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from random_gpts import as_pipeline, build_random_gpt, save_model
from reference import LLAMA

from megatron.data.tokenizer import ByteTokenizer, Tokenizer
from megatron.mesh.mesh import Axis
from megatron.model.gpt import GPT
from megatron.serving.app import Service
from megatron.serving.connections import ConnectionLimits
from megatron.serving.control import Control
from megatron.serving.engine import Engine
from megatron.serving.server import listening, open_port

VOCAB = 257


class Letters(ByteTokenizer):
    """Bytes that read as ASCII letters, so that every text of a random model is plain. newline: the token that ends a line."""

    def __init__(self, newline: int = 10) -> None:
        super().__init__()
        self.newline = newline

    def tokenize(self, text):
        return [self.newline if i == 10 else i for i in super().tokenize(text)]

    def detokenize(self, ids):
        return "".join(map(self.letter, ids))

    def letter(self, i: int) -> str:
        named = {self.newline: "\n", 256: "<|endoftext|>"}
        return named.get(i) or chr(i if 32 <= i < 127 else 97 + i % 26)


class Client:
    """A client of one server. log: the lines that the server wrote."""

    def __init__(self, port: int, engine: Engine | None = None) -> None:
        self.port, self.engine, self.log = port, engine, list[str]()

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Send a request, and return its reply.

        Args:
            method: of HTTP.
            path: on the server.
            body: JSON, or bytes as they are.
            headers: with underscores for dashes; "" for one that is to be left out.
        """
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in ({"content_type": "application/json"} | headers).items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, named, method=method)
        return urllib.request.urlopen(request, timeout=60)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send a request, and return the status and the body's JSON."""
        try:
            with self.open(method, path, body, **headers) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    @contextmanager
    def connected(self, body: dict[str, Any]) -> Iterator[socket.socket]:
        """Open a connection on which completions have been asked for, which is cut at the end whatever comes."""
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head = f"{head}Content-Length: {len(data)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(head + data)
            yield connection

    def complete(self, **body: Any) -> dict[str, Any]:
        status, reply = self("POST", "/v1/completions", body)
        assert status == 200, reply
        return reply

    def events(self, **body: Any) -> list[Any]:
        """Return the events of a stream, without the last one, which is [DONE]."""
        with self.open("POST", "/v1/completions", {**body, "stream": True}) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            *pieces, done, rest = reply.read().decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


@contextmanager
def served(
    model: Any,
    tokenizer: Tokenizer,
    max_tokens_total: int = 12000,
    max_waiting: int = 256,
    cache_tokens: int = 24000,
    limits: ConnectionLimits | None = None,
    buffer: int = 0,
    **service: Any,
) -> Iterator[Client]:
    """Serve a model in a thread, and yield a client of it.

    Args:
        model: the whole model.
        tokenizer: of the model.
        max_tokens_total: of a request, its prompt and its text.
        max_waiting: requests.
        cache_tokens: of all requests that are carried out at once.
        limits: of connections.
        buffer: bytes that the system keeps of a reply that nobody reads; 0 for its own number.
        service: further fields of `Service`.
    """
    with patch("megatron.serving.engine.MAX_WAITING", max_waiting):
        engine = Engine(as_pipeline(model), tokenizer, Control(Axis.alone("world")), cache_tokens=cache_tokens)
    port = open_port("127.0.0.1", 0)
    if buffer:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    client, over = Client(port.getsockname()[1], engine), threading.Event()
    offered = Service(engine, service.pop("name", "tiny"), max_tokens_total, client.log.append, **service)
    with (
        patch("megatron.serving.engine.EXCHANGE_SECONDS", 0.05),
        listening(offered, port, limits) as alive,
    ):  # the end is seen at a beat
        worker = threading.Thread(target=engine.run, args=(over.is_set,))
        worker.start()
        try:
            assert alive()
            yield client
        finally:
            over.set()
            worker.join(20)
    assert not worker.is_alive() and not alive()


def endless_model() -> GPT:
    """Build a model whose most probable text never ends by itself."""
    model = build_random_gpt(LLAMA, vocab=VOCAB)
    model.head.weight.data[256] = 0.0  # a logit of 0, where the greatest of 256 others is above
    return model


def save_endless_model(root: Path) -> Path:
    """Save such a model, whose tokenizer has a chat template."""
    template = {"chat_template.jinja": b"{{ messages[0].content }}"}
    return save_model(endless_model(), root, ByteTokenizer().files() | template)
