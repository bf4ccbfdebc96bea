"""Handle the HTTP routes of the server. Starlette, of the extra `server`, is imported only when the routes are built."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.data.errors import DataError
from megatron.serving import megatron_api
from megatron.serving.access import Access, with_access_checks
from megatron.serving.chat_api import ChatRequest, read_messages
from megatron.serving.chat_template import NO_TEMPLATE, ChatTemplate
from megatron.serving.completion_text import CompletionText
from megatron.serving.engine import Engine
from megatron.serving.fields import Fields, RequestError, one_line
from megatron.serving.openai_api import CompletionRequest
from megatron.serving.openai_fields import model_body, no_model
from megatron.serving.task import GenerationTask
from megatron.serving.waiting import QueuedTask, TaskResult, TextUpdate

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MAX_BYTES_PER_TOKEN = 32  # upper bound of the average in JSON: text has about five, an escaped Chinese character six
OTHER_FIELDS_BYTES = 1 << 16  # bytes of a request besides its prompts or messages
MAX_READ_BYTES = 16 << 20  # bytes that are read of a body that is too large, since clients read the error only after sending
CLIENT_CHECK_SECONDS = 0.2  # how often the server checks whether the client is still connected

IsDisconnected = Callable[[], Awaitable[bool]]  # returns whether the client of a request has disconnected


@dataclass(frozen=True)
class Service:
    """The model behind the routes, and its limits.

    Attributes:
        engine: runs the tasks.
        model: the model's name for clients.
        max_tokens_total: maximum number of tokens of one request, prompts and generated texts together.
        log: called with a line for each request.
        chat: the chat template; None if the checkpoint has none.
        access: the checks of hosts, origins and the API key.
        patience: seconds without progress after which the model counts as stuck.
    """

    engine: Engine
    model: str
    max_tokens_total: int
    log: Callable[[str], object]
    chat: ChatTemplate | None = None
    access: Access = field(default_factory=Access)
    patience: float = 60.0

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        if self.chat is not None:
            return self.chat.files.ends
        special = self.engine.tokenizer.special
        return (special["eod"],) if "eod" in special else ()

    @property
    def max_body_bytes(self) -> int:
        """Maximum number of bytes in the body of a request."""
        return max_body_bytes(self.max_tokens_total)


def max_body_bytes(max_tokens_total: int) -> int:
    """Return the maximum number of bytes in the body of a request.

    Tokenising a larger one would block this process for too long.
    """
    return MAX_BYTES_PER_TOKEN * max_tokens_total + OTHER_FIELDS_BYTES


async def task_events(
    service: Service, task: GenerationTask, is_disconnected: IsDisconnected
) -> AsyncIterator[TextUpdate | TaskResult]:
    """Submit a task, and yield its updates and its result. The task is stopped if the iterator is closed or the client leaves.

    Args:
        service: the model and its limits.
        task: the task.
        is_disconnected: returns whether the client has disconnected.

    Raises:
        RequestError: the task is invalid; or, later, it failed, or the server is stopping.
    """
    task.check(service.engine.model, service.max_tokens_total)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[TextUpdate | TaskResult]()

    def deliver(event: TextUpdate | TaskResult) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            # The engine's thread must not touch a queue of the event loop itself.
            loop.call_soon_threadsafe(events.put_nowait, event)

    pending = QueuedTask(task, deliver)
    service.engine.submit(pending)
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), CLIENT_CHECK_SECONDS)
            except TimeoutError:
                event = None
            if await is_disconnected():
                raise RequestError("the client has gone", status=499)
            if isinstance(event, TaskResult) and event.error:
                raise RequestError(event.error, status=event.status)
            if event is not None:
                yield event
            if isinstance(event, TaskResult):
                return
    finally:
        # The engine checks this at its next token, and then ends the task on all ranks.
        pending.dropped.set()


async def collect(
    service: Service, task: GenerationTask, is_disconnected: IsDisconnected, *, echo: bool = False
) -> tuple[list[CompletionText], TaskResult]:
    """Run a task to its end; return its complete texts, and its result.

    Args:
        service: the model and its limits.
        task: the task.
        is_disconnected: returns whether the client has disconnected.
        echo: the prompts are part of the texts.
    """
    completions = [CompletionText(task, prompt, service.engine.tokenizer, echo=echo) for prompt in task.prompts]
    done, events = TaskResult(), task_events(service, task, is_disconnected)
    try:
        async for event in events:
            if isinstance(event, TaskResult):
                done = event
            else:
                completions[event.index].add(event)
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # at once, not when the garbage collector closes it
    return completions, done


def build_app(service: Service) -> Any:
    """Return the ASGI application: `PUT /api`, OpenAI's routes and `GET /health`, behind the access checks."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    handlers = Handlers(service)
    routes = Starlette(
        routes=[
            Route("/api", handlers.api, methods=["PUT", "POST"]),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/v1/chat/completions", handlers.chat_completions, methods=["POST"]),
            Route("/v1/models", handlers.list_models),
            Route("/v1/models/{name:path}", handlers.one_model),
            Route("/health", handlers.health),
        ],
        exception_handlers={kind: handlers.refuse for kind in (RequestError, DataError, HTTPException)},
    )
    return with_access_checks(routes, service.access, service.log)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a reply in JSON.

    Args:
        body: the JSON value.
        status: the HTTP status.
        headers: headers besides those of the content.
    """
    from starlette.responses import JSONResponse

    return JSONResponse(body, status, headers)


class Handlers:
    """Handlers of the routes, and one of errors before a route is reached."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._began = int(time.time())

    async def api(self, request: Request) -> Response:
        """Answer Megatron-LM's route. Errors are plain text, as in Megatron-LM."""
        service = self.service
        quiet, request.state.began = False, time.monotonic()
        try:
            fields = await read_fields(request, service.max_body_bytes)
            quiet = fields.values.get("no_log") is True
            task = megatron_api.read_task(fields, service.engine.tokenizer)
            completions, done = await collect(service, task, request.is_disconnected)
            answer: object = megatron_api.reply(task, completions, done, service.engine.tokenizer)
            status = 200
        except (RequestError, DataError) as error:
            answer, status = str(error), getattr(error, "status", 400)
        if not quiet:
            self._log(request, f"status {status}" if status == 200 else f"status {status}, {answer}")
        return json_response(answer, status)

    async def completions(self, request: Request) -> Response:
        """Answer a request for OpenAI's text completions."""
        service = self.service
        request.state.began = time.monotonic()
        fields = await read_fields(request, service.max_body_bytes)
        return await self._reply(
            request, CompletionRequest.from_fields(fields, service.engine.tokenizer, service.model, service.ends)
        )

    async def chat_completions(self, request: Request) -> Response:
        """Answer a request for OpenAI's chat completions."""
        service = self.service
        request.state.began = time.monotonic()
        fields = await read_fields(request, service.max_body_bytes)
        ChatRequest.check(fields, service.model)
        messages = read_messages(fields)
        if service.chat is None:
            raise RequestError(NO_TEMPLATE)
        # The template runs in another process; a thread waits for it, so that the event loop can serve other clients.
        prompt = await asyncio.to_thread(service.chat.tokens, messages)
        wanted = ChatRequest.from_fields(
            fields,
            prompt,
            service.engine.model,
            model=service.model,
            ends=service.ends,
            max_tokens_total=service.max_tokens_total,
        )
        return await self._reply(request, wanted)

    async def _reply(self, request: Request, wanted: CompletionRequest | ChatRequest) -> Response:
        """Answer a request of OpenAI's API, as a stream or in one reply."""
        from starlette.responses import StreamingResponse

        service = self.service
        if wanted.stream:
            # Checked before the stream begins, after which no error status can be sent.
            wanted.task.check(service.engine.model, service.max_tokens_total)
            service.engine.check_room()
            self._log(request, "a stream begins")
            return StreamingResponse(event_stream(service, wanted), media_type="text/event-stream")
        completions, _ = await collect(service, wanted.task, request.is_disconnected, echo=wanted.echo)
        body = wanted.full_reply(completions)
        self._log(request, "status 200")
        return json_response(body)

    async def list_models(self, request: Request) -> Response:
        """Answer with the list of models, which has one entry."""
        return json_response({"object": "list", "data": [model_body(self.service.model, self._began)]})

    async def one_model(self, request: Request) -> Response:
        """Answer with the model of this name."""
        request.state.began = time.monotonic()
        if (name := request.path_params["name"]) != self.service.model:
            raise no_model(name, self.service.model)
        return json_response(model_body(self.service.model, self._began))

    async def health(self, request: Request) -> Response:
        """Answer with status 200 while the model makes progress, 503 when it is stuck."""
        if trouble := self.service.engine.trouble(self.service.patience):
            return json_response({"status": "stuck", "message": trouble}, 503)
        return json_response({"status": "ok"})

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Answer a request that a route has refused, or that matches no route."""
        from starlette.exceptions import HTTPException

        if isinstance(error, HTTPException):  # no such route or method; the headers name the allowed methods
            wrong = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
            return json_response(wrong.body(), wrong.status, error.headers)
        wrong = error if isinstance(error, RequestError) else RequestError(str(error))
        self._log(request, f"status {wrong.status}, {wrong}")
        return json_response(wrong.body(), wrong.status)

    def _log(self, request: Request, what: str) -> None:
        client, passed = request.client.host if request.client else "?", time.monotonic() - request.state.began
        self.service.log(f"{client} {request.method} {one_line(request.url.path)}: {one_line(what)}, {passed:.2f} s")


async def read_fields(request: Request, largest: int) -> Fields:
    """Return the fields of a request's body, which may have up to `largest` bytes.

    Raises:
        RequestError: the body is too large or no JSON object, or the client disconnects meanwhile.
    """
    from starlette.requests import ClientDisconnect

    check_content_type(request.headers.getlist("content-type"), request.headers.get("content-encoding", "identity"))
    body, size = bytearray(), 0
    try:
        async for piece in request.stream():
            size += len(piece)
            # The rest of a body that is too large is read but not kept, so that the client gets the error message.
            body += piece if size <= largest else b""
            if size > max(MAX_READ_BYTES, largest):
                break
    except ClientDisconnect as error:
        raise RequestError("the client has gone", status=499) from error
    if size > largest:
        what = f"the request's body is larger than {largest} bytes, which are more tokens than this server allows"
        raise RequestError(f"{what} (--max-tokens-to-oom)", status=413)
    return Fields(bytes(body))


def check_content_type(given: Sequence[str], encoding: str) -> None:
    """Raise RequestError for a body that is not declared as JSON, since browsers let any page send one declared as text."""
    kind, _, parameters = given[0].partition(";") if len(given) == 1 else ("", "", "")
    named = dict(part.strip().lower().partition("=")[::2] for part in parameters.split(";"))
    if kind.strip().lower() != "application/json":
        shown = f"is said to be {', '.join(given)!r}" if given else "has no Content-Type"
        wanted = "send JSON with the header 'Content-Type: application/json'"
        raise RequestError(f"the request's body {shown}: {wanted}", status=415)
    if named.get("charset", "utf-8").strip('"') not in ("utf-8", "utf8"):
        raise RequestError(f"the request's body is said to be in {named['charset']}: JSON is in UTF-8", status=415)
    if encoding.strip().lower() != "identity":
        raise RequestError(f"the request's body is said to be in {encoding}: send it as it is", status=415)


async def event_stream(service: Service, wanted: CompletionRequest | ChatRequest) -> AsyncIterator[str]:
    """Yield server-sent events: chunks with new parts of the texts, the usage if requested, errors, and [DONE]."""
    task = wanted.task
    completions = [CompletionText(task, prompt, service.engine.tokenizer, echo=wanted.echo) for prompt in task.prompts]

    def event(body: object) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    async def never_disconnected() -> bool:
        return False  # Starlette's response checks the connection itself, and closes this iterator

    for chunk in wanted.first_chunks():
        yield event(chunk)
    events = task_events(service, task, never_disconnected)
    try:
        async for update in events:
            if isinstance(update, TextUpdate):
                completions[update.index].add(update)
                for chunk in wanted.chunks(update.index, completions[update.index]):
                    yield event(chunk)
        for chunk in wanted.last_chunks(completions):
            yield event(chunk)
    except RequestError as error:
        yield event(error.body())
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # at once, not when the garbage collector closes it
    yield "data: [DONE]\n\n"
