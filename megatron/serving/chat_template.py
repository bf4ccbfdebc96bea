"""Convert conversations to text and tokens with a checkpoint's chat template; read its special tokens and end tokens."""

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

TEMPLATE_FILE, CONFIG_FILE, TOKENS_FILE, GENERATION_FILE = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
MODEL_FILE = "config.json"
MAX_TEMPLATE_LENGTH = 1 << 20  # bytes of a template; the max_characters published ones have some tens of thousands
MAX_JSON_BYTES = 32 << 20  # some JSON files list every added token
MAX_RENDER_SECONDS, MAX_START_SECONDS = 20.0, 120.0  # limits for rendering a conversation, and for starting the process
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
PASSED_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "HOME")  # others may hold secrets
NO_TEMPLATE = (
    "this checkpoint's tokenizer has no chat template, so the format of its conversations is not known: use /v1/completions, "
    "start the server with --chat-template FILE, or serve a checkpoint that tools/import_hf.py imported from a model with a "
    f"{TEMPLATE_FILE} or a chat_template in its {CONFIG_FILE}"
)


@dataclass(frozen=True)
class ChatFiles:
    """Chat settings from the files in a tokenizer's directory.

    Attributes:
        template: the chat template; None if there is none.
        tokens: texts of the special tokens that a template may use, by name, such as bos_token.
        ends: ids of the tokens that end a reply.
    """

    template: str | None
    tokens: Mapping[str, str]
    ends: tuple[int, ...]

    @classmethod
    def from_directory(cls, folder: Path, tokenizer: Tokenizer, given: str | None = None) -> ChatFiles:
        """Read the files, with the same precedence as transformers.

        Args:
            folder: the tokenizer's directory.
            tokenizer: the tokenizer.
            given: a template to use instead of the directory's.

        Raises:
            DataError: a file is damaged.
        """
        tokenizer_config, generation = _read_json(_find(folder, CONFIG_FILE)), _read_json(_find(folder, GENERATION_FILE))
        # tokenizer_config.json takes precedence over special_tokens_map.json.
        special_tokens = {**_read_json(_find(folder, TOKENS_FILE)), **tokenizer_config}
        tokens = {f"{role}_token": tokenizer.piece(tokenizer.special[role]) for role in ROLES if role in tokenizer.special}
        if "eod" in tokenizer.special:
            tokens.setdefault("eos_token", tokenizer.piece(tokenizer.special["eod"]))
        for role in ROLES:
            entry = special_tokens.get(f"{role}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                tokens[f"{role}_token"] = text
        eos = generation.get("eos_token_id", _read_json(folder / KEPT / MODEL_FILE).get("eos_token_id"))
        candidates = [tokenizer.special.get("eod"), tokenizer.special.get("eos"), *(eos if isinstance(eos, list) else [eos])]
        ends = tuple(dict.fromkeys(end for end in candidates if type(end) is int and end >= 0))
        return cls(_read_own_template(folder, tokenizer_config) if given is None else given, tokens, ends)


def read_template(file: Path) -> str:
    """Return the text of a template file; DataError if it cannot be read."""
    try:
        return _read(file, MAX_TEMPLATE_LENGTH).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8: {error}") from error


def _read_own_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the template for conversations without tools, from the template file or else from tokenizer_config.json."""
    if os.path.lexists(file := _find(folder, TEMPLATE_FILE)):
        return read_template(file)
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several templates with names
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    if template is not None and not (isinstance(template, str) and len(template) <= MAX_TEMPLATE_LENGTH):
        raise DataError(f"{folder / CONFIG_FILE}: its chat_template is not a text of up to {MAX_TEMPLATE_LENGTH} characters")
    return template


def _find(folder: Path, name: str) -> Path:
    """Return the path of a file: the original that an import has stored, or else the file in the tokenizer's directory."""
    original = folder / KEPT / name
    return original if os.path.lexists(original) else folder / name


def _read(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file; DataError if it has more than `max_bytes` or cannot be read."""
    try:
        return read_bytes(path, max_bytes)
    except OSError as error:
        raise DataError(f"{path}: {error_reason(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file does not exist."""
    if not os.path.lexists(path):
        return {}
    try:
        values = parse_json(_read(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a JSON object")
    return values


@dataclass
class ChatTemplate:
    """A chat template, rendered in a separate process that is started again if it was killed. Safe to use from several threads.

    Attributes:
        files: the template and its tokens.
        tokenizer: the model's tokenizer.
        max_characters: maximum number of characters of a conversation's text.
        unusable: the reason why the template cannot be used; empty if it can.
    """

    files: ChatFiles
    tokenizer: Tokenizer
    max_characters: int
    unusable: str = ""
    _process: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.files.template is None:
            self.unusable = NO_TEMPLATE
            return
        try:
            self._backend = self.tokenizer.backend()  # unlike `tokenize`, it encodes special tokens in a text as such
            with self._lock:
                self._start()
        except (DataError, RequestError) as error:
            self.unusable = f"the checkpoint's chat template cannot be used: {error}; pass --chat-template FILE to the server"
            self.close()

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Return a conversation, up to the beginning of the reply, as tokens; RequestError if it cannot be rendered."""
        text = self.text(messages)
        try:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        except UnicodeEncodeError as error:
            raise RequestError("the chat template writes an unpaired surrogate, which is not text", "messages") from error

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a conversation, up to the beginning of the reply, as text, as transformers' `apply_chat_template` does."""
        if self.unusable:
            raise RequestError(self.unusable)
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                return self._ask(variables, MAX_RENDER_SECONDS)
            except RequestError as error:
                raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error

    def close(self) -> None:
        """End the process, even if it is rendering."""
        # Kill it before taking the lock: a thread that waits for the process holds the lock until the process answers or ends.
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._stop()

    def _start(self) -> None:
        """Start the process and send it the template."""
        environment = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron.serving.chat_render"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches only the server, which then ends the process
        )
        settings = {"template": self.files.template, "tokens": self.files.tokens, "max_characters": self.max_characters}
        self._ask(settings, MAX_START_SECONDS)

    def _ask(self, message: Mapping[str, Any], seconds: float) -> str:
        """Send the process a message and return its reply; RequestError for an error in the reply, or if none comes in time."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RequestError("its process has ended")
        # Reading the reply has no timeout, but it ends when the process is killed.
        kill_timer = threading.Timer(seconds, process.kill)
        kill_timer.start()
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(16 * self.max_characters + (1 << 20))  # a character has up to twelve bytes in JSON
            answer = json.loads(line)
        except (OSError, ValueError):
            self._stop()
            raise RequestError(f"it did not end within {seconds:g} s, or needed too much memory") from None
        finally:
            kill_timer.cancel()
        if "error" in answer:
            raise RequestError(str(answer["error"]))
        return str(answer["text"])

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
