"""A stand-in for W&B's package: every call as a line of JSON in the directory of the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FAULT = os.environ.get("FAKE_WANDB_FAULT")


class Run:
    """A run that writes each call to a file."""

    url = "https://wandb.example/run"

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "calls.jsonl"

    def note(self, call: str, /, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"call": call, "process": os.getpid(), **values}) + "\n")

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if FAULT == "log":
            raise RuntimeError("the server says no")
        self.note("log", values=values, step=step)

    def mark_preempting(self) -> None:
        self.note("mark_preempting")

    def finish(self, exit_code: int | None = None) -> None:
        self.note("finish", exit_code=exit_code)


def init(**wanted: Any) -> Run:
    if FAULT == "hang":
        time.sleep(60)
    if FAULT == "init":
        raise RuntimeError("no network")
    run = Run(wanted["dir"])
    run.note("init", **wanted)
    return run
