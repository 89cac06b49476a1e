"""What stands before the routes: the key, the name of the machine, and the size and pace of bodies."""

import asyncio
import hmac
import re

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvoffload.server.errors import Failure, refuse
from kvoffload.server.page import PATHS
from kvoffload.units import format_size

_OPEN_PATHS = {"/health", *PATHS}


def failure_response(failure: Failure) -> JSONResponse:
    return JSONResponse(failure.body(), failure.status, headers=failure.headers)


class KeyGuard:
    """Lets only requests with the key through, but for /health and the page. Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._expected = app, b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        told = "wrong API key" if given else "no API key: send it as 'Authorization: Bearer KEY'"
        failure = Failure(401, told, kind="authentication_error", code="invalid_api_key")
        await failure_response(failure)(scope, receive, send)


class LocalNames:
    """Lets only requests through that call this machine by a local name: a web page elsewhere can have a name of its
    own lead here, and would then be taken for ours."""

    _LOCAL = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope["headers"]).get(b"host", b"") if scope["type"] == "http" else None
        if host is None or self._LOCAL.fullmatch(host):
            await self._app(scope, receive, send)
            return
        told = "without --api-key this server answers only to localhost, 127.0.0.1 and [::1]"
        await failure_response(Failure(421, told, code="wrong_host"))(scope, receive, send)


async def read_body(request: Request, *, most: int, timeout_s: float) -> bytes:
    """The body of a JSON request; raises RequestError where it is too large, too slow or not JSON by its own word."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refuse(f"content type {kind!r}: expected application/json", status=415)
    too_large = refuse(f"the body is larger than {format_size(most)} (--max-body)", status=413, code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise refuse(f"the body did not arrive within {timeout_s:g} s", status=408) from None
    except ClientDisconnect:
        raise refuse("the client went away while it sent the body") from None
    return b"".join(chunks)
