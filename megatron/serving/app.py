"""The HTTP routes. Starlette is imported only when they are built: it belongs to the extra `server`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.data.errors import DataError
from megatron.serving import megatron_api
from megatron.serving.engine import Done, Engine, Pending, Update
from megatron.serving.fields import Fields, RequestError
from megatron.serving.openai_api import Completion, choice, error_body, models
from megatron.serving.record import Record
from megatron.serving.task import Task

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BYTES_OF_A_TOKEN = 32  # at most, on average, in JSON: text holds five, an escaped Chinese character six
BYTES_BESIDES = 1 << 16  # of the other fields
MOST_READ = 16 << 20  # bytes of a body that is too large: before a client has sent all it does not hear why
LONGEST_LINE = 300  # characters of a line of the log
LOOK = 0.2  # seconds between two looks at whether the client is still there


@dataclass(frozen=True)
class Service:
    """What the routes need. model: its name for clients. most_tokens: of one request. log: gets one line for each request."""

    engine: Engine
    model: str
    most_tokens: int
    log: Callable[[str], object]

    @property
    def largest_body(self) -> int:
        """Bytes of a request. While a larger one became tokens, nothing else in this process could run."""
        return BYTES_OF_A_TOKEN * self.most_tokens + BYTES_BESIDES


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


def build(service: Service) -> Starlette:
    """The application: `PUT /api`, `POST /v1/completions`, `GET /v1/models`, `GET /health`."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    began = int(time.time())

    def line(request: Request, what: str) -> None:
        client, passed = request.client.host if request.client else "?", time.monotonic() - request.state.began
        told = "".join(c if c.isprintable() else "?" for c in what[:LONGEST_LINE])  # it may quote what the client sent
        service.log(f"{client} {request.method} {request.url.path}: {told}, {passed:.2f} s")

    async def api(request: Request) -> Response:
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
            line(request, f"status {status}" if status == 200 else f"status {status}, {answer}")
        return JSONResponse(answer, status)

    async def completions(request: Request) -> Response:
        request.state.began = time.monotonic()
        fields = await read(request, service.largest_body)
        wanted = Completion.of(fields, service.engine.tokenizer, service.model)
        if wanted.stream:
            wanted.task.check(service.engine.model, service.most_tokens)  # while there can still be a status
            service.engine.check_room()
            line(request, "a stream begins")
            return StreamingResponse(stream(service, wanted), media_type="text/event-stream")
        records, _ = await collect(service, wanted.task, request.is_disconnected, echo=wanted.echo)
        choices = [told for i, record in enumerate(records) if (told := choice(i, record)) is not None]
        line(request, "status 200")
        return JSONResponse(wanted.body(choices, usage=wanted.count(records)))

    async def list_models(request: Request) -> Response:
        return JSONResponse(models(service.model, began))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # no route, or not with this method: its headers tell which there are
            wrong = RequestError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
            return JSONResponse(error_body(wrong), wrong.status, error.headers)
        wrong = error if isinstance(error, RequestError) else RequestError(str(error))
        line(request, f"status {wrong.status}, {wrong}")
        return JSONResponse(error_body(wrong), wrong.status)

    return Starlette(
        routes=[
            Route("/api", api, methods=["PUT", "POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/health", health),
        ],
        exception_handlers={RequestError: refused, DataError: refused, HTTPException: refused},
    )


async def read(request: Request, largest: int) -> Fields:
    """The body as fields; RequestError for one that is too large or no JSON object, and where the client goes meanwhile."""
    from starlette.requests import ClientDisconnect

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


async def stream(service: Service, wanted: Completion) -> AsyncIterator[str]:
    """Server-sent events: a piece of one text each, at last perhaps the usage, and [DONE]. An error is an event too."""
    task = wanted.task
    records = [Record(task, prompt, service.engine.tokenizer, echo=wanted.echo) for prompt in task.prompts]

    def event(body: object) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    async def stays() -> bool:
        return False  # the response that reads this iterator looks for itself, and closes it

    events = updates(service, task, stays)
    try:
        async for update in events:
            if isinstance(update, Update):
                records[update.index].add(update)
                if (piece := choice(update.index, records[update.index])) is not None:
                    yield event(wanted.body([piece]))
        if wanted.usage:
            yield event(wanted.body([], usage=wanted.count(records)))
    except RequestError as error:
        yield event(error_body(error))
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # at once, not when the collector comes by
    yield "data: [DONE]\n\n"
