"""From a job's events to an HTTP response. When the client goes away the job is cancelled, however it was answered."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kvoffload.runtime.events import Progress
from kvoffload.server.errors import Failure, RequestError
from kvoffload.server.job import Done, Job, Piece, Queued
from kvoffload.server.replies import DONE, sse
from kvoffload.server.service import Accepted


class JobStream(StreamingResponse):
    """Server-sent events; cancels its job when the response ends in whatever way."""

    def __init__(self, job: Job, chunks: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


def streamed(accepted: Accepted, *, with_usage: bool, with_progress: bool) -> JobStream:
    """The answer chunk by chunk; a failure after the first byte is an event of its own."""
    headers = {
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
        "X-Kvoffload-Queue-Position": str(accepted.position),
    }
    chunks = _chunks(accepted, with_usage=with_usage, with_progress=with_progress)
    return JobStream(accepted.job, chunks, headers)


async def _chunks(accepted: Accepted, *, with_usage: bool, with_progress: bool) -> AsyncIterator[bytes]:
    reply, started_s = accepted.reply, time.monotonic()
    yield b": behind %d others\n\n" % accepted.position  # a comment, which brings the headers on their way
    for chunk in reply.first():
        yield sse(chunk)
    while True:
        match await accepted.mailbox.get():
            case Piece(text, layers):
                yield sse(reply.piece(text, layers))
            case Progress() as progress if with_progress:
                yield sse(reply.progress(progress, reply.prompt_tokens - progress.total_tokens, started_s))
            case Queued(position) if with_progress:
                yield sse(reply.queued(position))
            case Failure() as failure:
                yield sse(failure.body())
                return
            case Done() as done:
                yield sse(reply.last(done))
                if with_usage:
                    yield sse(reply.usage(done))
                yield DONE
                return


async def whole(request: Request, accepted: Accepted) -> Response:
    """The answer in one piece."""
    waiting = asyncio.ensure_future(_collect(accepted))
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(waiting.result())
    finally:
        accepted.job.cancel()
        waiting.cancel()
        leaving.cancel()


async def _collect(accepted: Accepted) -> dict[str, Any]:
    text = ""
    while True:
        match await accepted.mailbox.get():
            case Piece(piece):
                text += piece
            case Failure() as failure:
                raise RequestError(failure)
            case Done() as done:
                return accepted.reply.whole(text, done)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
