"""The routes. Each is a few lines: read, check, queue, answer."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvoffload.server.answers import streamed, whole
from kvoffload.server.errors import Failure, RequestError, refuse, server_failure
from kvoffload.server.guard import KeyGuard, LocalNames, failure_response, read_body
from kvoffload.server.page import add_page
from kvoffload.server.protocol import ChatRequest, CompletionRequest, parse
from kvoffload.server.service import Service

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service) -> FastAPI:
    """The application; its scheduler starts and ends with it."""
    app = FastAPI(title="kvoffload", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan(service))
    if service.options.api_key is not None:
        app.add_middleware(KeyGuard, api_key=service.options.api_key)
    elif service.options.is_local:
        app.add_middleware(LocalNames)
    app.add_exception_handler(RequestError, _on_failure)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_api_route("/v1/chat/completions", _completions(service, ChatRequest), methods=["POST"])
    app.add_api_route("/v1/completions", _completions(service, CompletionRequest), methods=["POST"])
    _add_reports(app, service)
    add_page(app)
    return app


def _lifespan(service: Service) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            service.scheduler.close()

    return lifespan


def _completions(service: Service, kind: type[ChatRequest] | type[CompletionRequest]) -> Callable[..., Any]:
    options = service.options

    async def complete(request: Request) -> Response:
        body = await read_body(request, most=options.max_body, timeout_s=options.body_timeout_s)
        asked: ChatRequest | CompletionRequest = parse(kind, body)
        if asked.stream_options is not None and not asked.stream:
            raise refuse("stream_options: only for stream=true", param="stream_options")
        accepted = await service.accept(asked)
        if not asked.stream:
            return await whole(request, accepted)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return streamed(accepted, with_usage=with_usage, with_progress=asked.kvoffload.return_progress)

    return complete


def _add_reports(app: FastAPI, service: Service) -> None:
    model = {
        "id": service.options.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "kvoffload",
    }

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(model)

    async def health() -> Response:
        scheduler = service.scheduler
        told = {"status": "ok" if scheduler.alive else "stopping", "running": scheduler.n_running,
                "queued": scheduler.n_waiting}  # fmt: skip
        return JSONResponse(told, 200 if scheduler.alive else 503)

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=METRICS_TYPE)

    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", one_model, methods=["GET"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"])


async def _on_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return failure_response(error.failure)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    return failure_response(Failure(error.status_code, told))


async def _on_bug(request: Request, error: Exception) -> Response:
    return failure_response(server_failure("the server failed at this request"))
