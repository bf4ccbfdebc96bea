"""The HTTP routes. Starlette is imported only when they are built: it belongs to the extra `server`."""

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
from megatron.serving.access import Access, gated
from megatron.serving.chat_api import Chat, read_messages
from megatron.serving.chat_template import NO_TEMPLATE, ChatTemplate
from megatron.serving.engine import Done, Engine, Pending, Update
from megatron.serving.fields import Fields, RequestError, one_line
from megatron.serving.openai_api import Completion
from megatron.serving.openai_fields import model_body, no_model
from megatron.serving.record import Record
from megatron.serving.task import Task

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

BYTES_OF_A_TOKEN = 32  # at most, on average, in JSON: text holds five, an escaped Chinese character six
BYTES_BESIDES = 1 << 16  # of the other fields
MOST_READ = 16 << 20  # bytes of a body that is too large: before a client has sent all it does not hear why
LOOK = 0.2  # seconds between two looks at whether the client is still there


@dataclass(frozen=True)
class Service:
    """What the routes need.

    model: its name for clients. most_tokens: of one request. log: gets one line for each request. chat: None where nothing is
    known of conversations. patience: seconds without progress after which the model counts as stuck.
    """

    engine: Engine
    model: str
    most_tokens: int
    log: Callable[[str], object]
    chat: ChatTemplate | None = None
    access: Access = field(default_factory=Access)
    patience: float = 60.0

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        if self.chat is not None:
            return self.chat.files.ends
        special = self.engine.tokenizer.special
        return (special["eod"],) if "eod" in special else ()

    @property
    def largest_body(self) -> int:
        """The most bytes that a request may have."""
        return largest_body(self.most_tokens)


def largest_body(most_tokens: int) -> int:
    """Bytes of a request. While a larger one became tokens, nothing else in this process could run."""
    return BYTES_OF_A_TOKEN * most_tokens + BYTES_BESIDES


async def updates(service: Service, task: Task, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[Update | Done]:
    """Have a task carried out. Stops it where this iterator is closed, and where the client has gone.

    RequestError for what is wrong with the task; for a failure, or the server's end, when it happens.
    """
    task.check(service.engine.model, service.most_tokens)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Update | Done]()

    def deliver(event: Update | Done) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(events.put_nowait, event)

    pending = Pending(task, deliver)
    service.engine.submit(pending)
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), LOOK)
            except TimeoutError:
                event = None
            if await gone():
                raise RequestError("the client has gone", status=499)
            if isinstance(event, Done) and event.error:
                raise RequestError(event.error, status=event.status)
            if event is not None:
                yield event
            if isinstance(event, Done):
                return
    finally:
        pending.dropped.set()


async def collect(
    service: Service, task: Task, gone: Callable[[], Awaitable[bool]], *, echo: bool = False
) -> tuple[list[Record], Done]:
    """All texts of a task at their ends."""
    records = [Record(task, prompt, service.engine.tokenizer, echo=echo) for prompt in task.prompts]
    done, events = Done(), updates(service, task, gone)
    try:
        async for event in events:
            if isinstance(event, Done):
                done = event
            else:
                records[event.index].add(event)
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # at once, not when the collector comes by
    return records, done


def build(service: Service) -> Any:
    """Return the application: `PUT /api`, OpenAI's routes, `GET /health`, and in front of them all who may ask."""
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
    return gated(routes, service.access, service.log)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a reply in JSON."""
    from starlette.responses import JSONResponse

    return JSONResponse(body, status, headers)


class Handlers:
    """One method for each route, and for what goes wrong on the way to it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._began = int(time.time())

    async def api(self, request: Request) -> Response:
        """Megatron-LM's own route. Its errors are plain text, as they are there."""
        service = self.service
        quiet, request.state.began = False, time.monotonic()
        try:
            fields = await read(request, service.largest_body)
            quiet = fields.held.get("no_log") is True
            task = megatron_api.task_of(fields, service.engine.tokenizer)
            records, done = await collect(service, task, request.is_disconnected)
            answer: object = megatron_api.reply(task, records, done, service.engine.tokenizer)
            status = 200
        except (RequestError, DataError) as error:
            answer, status = str(error), getattr(error, "status", 400)
        if not quiet:
            self._log(request, f"status {status}" if status == 200 else f"status {status}, {answer}")
        return json_response(answer, status)

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions of a text."""
        service = self.service
        request.state.began = time.monotonic()
        fields = await read(request, service.largest_body)
        return await self._reply(request, Completion.of(fields, service.engine.tokenizer, service.model, service.ends))

    async def chat_completions(self, request: Request) -> Response:
        """OpenAI's completions of a conversation."""
        service = self.service
        request.state.began = time.monotonic()
        fields = await read(request, service.largest_body)
        Chat.check(fields, service.model)
        messages = read_messages(fields)
        if service.chat is None:
            raise RequestError(NO_TEMPLATE)
        prompt = await asyncio.to_thread(service.chat.tokens, messages)
        wanted = Chat.of(
            fields, prompt, service.engine.model, model=service.model, ends=service.ends, most_tokens=service.most_tokens
        )
        return await self._reply(request, wanted)

    async def _reply(self, request: Request, wanted: Completion | Chat) -> Response:
        from starlette.responses import StreamingResponse

        service = self.service
        if wanted.stream:
            wanted.task.check(service.engine.model, service.most_tokens)  # while there can still be a status
            service.engine.check_room()
            self._log(request, "a stream begins")
            return StreamingResponse(stream(service, wanted), media_type="text/event-stream")
        records, _ = await collect(service, wanted.task, request.is_disconnected, echo=wanted.echo)
        body = wanted.whole(records)
        self._log(request, "status 200")
        return json_response(body)

    async def list_models(self, request: Request) -> Response:
        """The only model, in a list."""
        return json_response({"object": "list", "data": [model_body(self.service.model, self._began)]})

    async def one_model(self, request: Request) -> Response:
        """The model, by its name."""
        request.state.began = time.monotonic()
        if (name := request.path_params["name"]) != self.service.model:
            raise no_model(name, self.service.model)
        return json_response(model_body(self.service.model, self._began))

    async def health(self, request: Request) -> Response:
        """Status 200 while the model makes progress, 503 when it is stuck."""
        if trouble := self.service.engine.trouble(self.service.patience):
            return json_response({"status": "stuck", "message": trouble}, 503)
        return json_response({"status": "ok"})

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Answer a request that a route has refused, or that no route takes."""
        from starlette.exceptions import HTTPException

        if isinstance(error, HTTPException):  # no route, or not with this method: its headers tell which there are
            wrong = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
            return json_response(wrong.body(), wrong.status, error.headers)
        wrong = error if isinstance(error, RequestError) else RequestError(str(error))
        self._log(request, f"status {wrong.status}, {wrong}")
        return json_response(wrong.body(), wrong.status)

    def _log(self, request: Request, what: str) -> None:
        client, passed = request.client.host if request.client else "?", time.monotonic() - request.state.began
        self.service.log(f"{client} {request.method} {one_line(request.url.path)}: {one_line(what)}, {passed:.2f} s")


async def read(request: Request, largest: int) -> Fields:
    """The body as fields; RequestError for one that is too large or no JSON object, and where the client goes meanwhile."""
    from starlette.requests import ClientDisconnect

    check_content_type(request.headers.getlist("content-type"), request.headers.get("content-encoding", "identity"))
    body, size = bytearray(), 0
    try:
        async for piece in request.stream():
            size += len(piece)
            body += piece if size <= largest else b""
            if size > max(MOST_READ, largest):
                break
    except ClientDisconnect as error:
        raise RequestError("the client has gone", status=499) from error
    if size > largest:
        what = f"the request's body is larger than {largest} bytes, which are more tokens than this server allows"
        raise RequestError(f"{what} (--max-tokens-to-oom)", status=413)
    return Fields(bytes(body))


def check_content_type(given: Sequence[str], encoding: str) -> None:
    """RequestError for a body that is not said to be JSON: a browser lets any page send one that is said to be text."""
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


async def stream(service: Service, wanted: Completion | Chat) -> AsyncIterator[str]:
    """Server-sent events: a piece of one text each, at last perhaps the usage, and [DONE]. An error is an event too."""
    task = wanted.task
    records = [Record(task, prompt, service.engine.tokenizer, echo=wanted.echo) for prompt in task.prompts]

    def event(body: object) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    async def stays() -> bool:
        return False  # the response that reads this iterator looks for itself, and closes it

    for piece in wanted.first_pieces():
        yield event(piece)
    events = updates(service, task, stays)
    try:
        async for update in events:
            if isinstance(update, Update):
                records[update.index].add(update)
                for piece in wanted.pieces(update.index, records[update.index]):
                    yield event(piece)
        for piece in wanted.last_pieces(records):
            yield event(piece)
    except RequestError as error:
        yield event(error.body())
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # at once, not when the collector comes by
    yield "data: [DONE]\n\n"
