"""Turn conversations into text with the checkpoint's chat template; read its special tokens and the tokens that end a reply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.tokenizer import KEPT
from megatron.data.errors import DataError
from megatron.data.tokenizer import Tokenizer
from megatron.files.regular import error_reason, parse_json, read_bytes
from megatron.serving.fields import RequestError

TEMPLATE, CONFIG, TOKENS, GENERATION = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
MODEL = "config.json"
MAX_TEMPLATE = 1 << 20  # bytes of a template; the longest published ones have some tens of thousands
MAX_FILE = 32 << 20  # bytes of a JSON file; some list every added token
MAX_SECONDS, MAX_START = 20.0, 120.0  # time limits of rendering a conversation, and of starting the template's process
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")  # all others, which may hold secrets, are removed
NO_TEMPLATE = (
    "this checkpoint's tokenizer carries no chat template, so how it writes a conversation is not known: ask /v1/completions, "
    "start the server with --chat-template FILE, or serve what tools/import_hf.py made of a model that has a "
    f"{TEMPLATE} or a chat_template in its {CONFIG}"
)


@dataclass(frozen=True)
class ChatFiles:
    """Chat settings from the files beside a tokenizer.

    Attributes:
        template: the chat template; None for none.
        tokens: texts of the special tokens that a template may use, by name, such as bos_token.
        ends: ids of the tokens that end a reply.
    """

    template: str | None
    tokens: Mapping[str, str]
    ends: tuple[int, ...]

    @classmethod
    def from_directory(cls, folder: Path, tokenizer: Tokenizer, given: str | None = None) -> ChatFiles:
        """Read the files as transformers does.

        Args:
            folder: the tokenizer's directory.
            tokenizer: the tokenizer.
            given: a template to use instead of the directory's.

        Raises:
            DataError: a file is damaged.
        """
        about, generation = _read_json(_place(folder, CONFIG)), _read_json(_place(folder, GENERATION))
        # tokenizer_config.json takes precedence over special_tokens_map.json.
        named = {**_read_json(_place(folder, TOKENS)), **about}
        tokens = {f"{role}_token": tokenizer.piece(tokenizer.special[role]) for role in ROLES if role in tokenizer.special}
        if "eod" in tokenizer.special:
            tokens.setdefault("eos_token", tokenizer.piece(tokenizer.special["eod"]))
        for role in ROLES:
            entry = named.get(f"{role}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                tokens[f"{role}_token"] = text
        eos = generation.get("eos_token_id", _read_json(folder / KEPT / MODEL).get("eos_token_id"))
        listed = [tokenizer.special.get("eod"), tokenizer.special.get("eos"), *(eos if isinstance(eos, list) else [eos])]
        ends = tuple(dict.fromkeys(end for end in listed if type(end) is int and end >= 0))
        return cls(_template(folder, about) if given is None else given, tokens, ends)


def read_template(file: Path) -> str:
    """Return the text of a template file; DataError if it cannot be read."""
    try:
        return _read(file, MAX_TEMPLATE).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8: {error}") from error


def _template(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Return the template for conversations without tools: that of the template file, else of tokenizer_config.json."""
    if os.path.lexists(file := _place(folder, TEMPLATE)):
        return read_template(file)
    held = about.get("chat_template")
    if isinstance(held, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in held if isinstance(each, dict)}
        held = named.get("default")
    if held is not None and not (isinstance(held, str) and len(held) <= MAX_TEMPLATE):
        raise DataError(f"{folder / CONFIG}: its chat_template is no text of up to {MAX_TEMPLATE} characters")
    return held


def _place(folder: Path, name: str) -> Path:
    """Return the path of a file: the authors' original if it was kept, else the one beside the tokenizer."""
    kept = folder / KEPT / name
    return kept if os.path.lexists(kept) else folder / name


def _read(path: Path, most: int) -> bytes:
    """Return the content of a regular file of up to `most` bytes; DataError for anything else."""
    try:
        return read_bytes(path, most)
    except OSError as error:
        raise DataError(f"{path}: {error_reason(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one if there is no such file."""
    if not os.path.lexists(path):
        return {}
    try:
        held = parse_json(_read(path, MAX_FILE))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(held, dict):
        raise DataError(f"{path} is no JSON object")
    return held


@dataclass
class ChatTemplate:
    """A chat template that is rendered in a separate process, which is started when it is needed. Safe for several threads.

    Attributes:
        files: the template and its tokens.
        tokenizer: the tokenizer of the model.
        longest: maximum number of characters of a conversation's text.
        trouble: the reason why the template cannot be used; empty if it can.
    """

    files: ChatFiles
    tokenizer: Tokenizer
    longest: int
    trouble: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.files.template is None:
            self.trouble = NO_TEMPLATE
            return
        try:
            self._backend = self.tokenizer.backend()  # it recognizes the special tokens that templates write as text
            with self._lock:
                self._start()
        except (DataError, RequestError) as error:
            self.trouble = f"the checkpoint's chat template cannot be used: {error}; start the server with --chat-template FILE"
            self.close()

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Return a conversation with the beginning of the reply as tokens; RequestError if the template refuses it."""
        text = self.text(messages)
        try:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        except UnicodeEncodeError as error:
            raise RequestError("the chat template writes half of a surrogate pair, which is no text", "messages") from error

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a conversation with the beginning of the reply as text, as transformers' `apply_chat_template` does."""
        if self.trouble:
            raise RequestError(self.trouble)
        asked = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                return self._ask(asked, MAX_SECONDS)
            except RequestError as error:
                raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error

    def close(self) -> None:
        """End the process, even if it is rendering."""
        # Killed before taking the lock, which a thread that waits for the process holds.
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._stop()

    def _start(self) -> None:
        """Start the process, and send it the template."""
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron.serving.chat_render"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches only the server, which then ends the process
        )
        about = {"template": self.files.template, "tokens": self.files.tokens, "longest": self.longest}
        self._ask(about, MAX_START)

    def _ask(self, question: Mapping[str, Any], seconds: float) -> str:
        """Return the process's answer; RequestError for an error in it, or without an answer in time."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RequestError("its process has ended")
        # The read below has no timeout; killing the process ends it.
        late = threading.Timer(seconds, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(16 * self.longest + (1 << 20))  # a character has up to twelve bytes in JSON
            answer = json.loads(line)
        except (OSError, ValueError):
            self._stop()
            raise RequestError(f"it did not come to an end in {seconds:g} s, or took too much memory") from None
        finally:
            late.cancel()
        if "error" in answer:
            raise RequestError(str(answer["error"]))
        return str(answer["text"])

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
