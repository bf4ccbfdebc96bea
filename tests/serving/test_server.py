"""The server as a process, on one and on two ranks: it starts, answers, and ends as it should."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from random_gpts import as_pipeline
from serving import Client, endless_model, save_endless_model

from megatron.data.tokenizer import ByteTokenizer
from megatron.inference.generate import extend_texts
from megatron.inference.sampling import Sampling
from megatron.inference.texts import GeneratedText

TOOL = Path(__file__).parents[2] / "tools" / "text_generation_server.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def start_tool(root: Path, count: int, *flags: str) -> Iterator[tuple[list[subprocess.Popen[str]], Client]]:
    """The tool on `count` processes, and a client of its first; all are gone afterwards."""
    port, master = free_port(), free_port()
    job = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": master,
        "OMP_NUM_THREADS": 1,
    }
    command = [os.environ["WARM_PYTHON"], str(TOOL), "--load", str(root), "--port", str(port), *flags]
    processes = []
    try:
        for rank in range(count):
            place = {name: str(value) for name, value in {**job, "RANK": rank, "LOCAL_RANK": rank}.items()}
            processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **place}))
        yield processes, Client(port)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_until_up(processes: list[subprocess.Popen[str]], client: Client) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        try:
            client("GET", "/health")
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not come up")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_endless_model(folder)
    return folder


def generate_greedily(prompts: list[str], count: int) -> list[str]:
    texts = [GeneratedText.from_prompt(prompt.encode()) for prompt in prompts]
    for _ in extend_texts(as_pipeline(endless_model()), texts, max_new_tokens=count, sampling=Sampling(0.0)):
        pass
    return [ByteTokenizer().detokenize(text.tokens) for text in texts]


def test_two_ranks_serve_and_end_together(root: Path) -> None:
    """Equal to one process; a client that leaves a long stream stops both ranks; so does a signal to one of them."""
    with start_tool(root, 2, "--pipeline-model-parallel-size", "2") as (processes, client):
        wait_until_up(processes, client)
        asked = {"prompts": ["Hello", "Go"], "tokens_to_generate": 8, "top_k": 1}
        assert client("PUT", "/api", asked)[1]["text"] == generate_greedily(["Hello", "Go"], 8)
        seeded = dict(prompt=["Hello", "Go"], max_tokens=8, seed=4)
        assert client.complete(**seeded)["choices"] == client.complete(**seeded)["choices"]
        talk = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
        status, reply = client("POST", "/v1/chat/completions", {**talk, "stop": list("\0\1\2\3\4")})
        assert status == 200 and "Hello" + reply["choices"][0]["message"]["content"] == generate_greedily(["Hello"], 8)[0]
        assert client("GET", "/health") == (200, {"status": "ok"})
        with client.connected({"prompt": "x", "max_tokens": 11000, "temperature": 0, "stream": True}) as leaving:
            assert b"200" in leaving.recv(100)
        began = time.monotonic()
        assert client("PUT", "/api", asked)[1]["text"] == generate_greedily(["Hello", "Go"], 8)
        assert time.monotonic() - began < 15
        processes[1].send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], ended
        assert f"serving {root.name} on http://127.0.0.1:{client.port}" in ended[0][1] and ended[1][1] == ""


def test_a_taken_port_and_ctrl_c(root: Path) -> None:
    with start_tool(root, 1) as (processes, client):
        wait_until_up(processes, client)
        command = [sys.executable, str(TOOL), "--load", str(root), "--port", str(client.port)]
        second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert second.returncode == 2 and second.stdout == ""
        said = f"error: --port {client.port} cannot be opened on 127.0.0.1: Address already in use; choose another\n"
        assert second.stderr == said
        processes[0].send_signal(signal.SIGINT)
        assert processes[0].wait(60) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--load", "/nowhere"), "/nowhere"),
        (("--port", "70000"), "--port 70000 is not a port"),
        (("--max-tokens-to-oom", "0"), "--max-tokens-to-oom 0"),
        (("--request-timeout", "0"), "--request-timeout 0.0 is no limit"),
        (("--max-connections", "-1"), "--max-connections -1 is no limit"),
        (("--health-timeout", "nan"), "--health-timeout nan"),
        (("--allow-origin", "app.example.org"), "--allow-origin app.example.org is not an origin"),
        (("--allow-host", "a/b"), "--allow-host a/b is not a host"),
        (("--api-key", ""), "--api-key is empty"),
        (("--chat-template", "/nowhere.jinja"), "/nowhere.jinja: No such file"),
        (("--tensor-model-parallel-size", "2"), "start with torchrun --nproc_per_node 2"),
    ],
)
def test_checkpoints_that_cannot_be_served_are_refused(root, flags, message, capsys) -> None:
    assert tool_main()(["--load", str(root), "--device", "cpu", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_missing_server_package_is_named(root, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert tool_main()(["--load", str(root)]) == 2
    assert capsys.readouterr().err == "error: the server needs the package uvicorn: pip install -e '.[server]'\n"


def tool_main():
    import runpy

    return runpy.run_path(str(TOOL))["main"]
