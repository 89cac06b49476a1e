"""How uvicorn is set up here: HTTP/1.1 by h11, with an end to clients that keep a connection and do nothing with it."""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvoffload.server.app import make_app
from kvoffload.server.service import Service


def server_config(service: Service, **fields: Any) -> uvicorn.Config:
    """Of a server for this service."""

    class Patient(_PatientProtocol):
        patience_s = service.options.body_timeout_s

    return uvicorn.Config(make_app(service), http=Patient, ws="none", access_log=False, server_header=False, **fields)


class _PatientProtocol(H11Protocol):
    """Closes a connection on which the head of a request is under way for longer than ``patience_s``, or what was sent
    is not read for so long. uvicorn itself only watches connections between two requests."""

    patience_s = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head, self._stalled = _Timer(), _Timer()
        self._head.start(self.loop, self.patience_s, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head.stop()
        else:
            self._head.start(self.loop, self.patience_s, self.transport.close)

    def on_response_complete(self) -> None:
        self._head.stop()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled.start(self.loop, self.patience_s, self.transport.abort)  # close() would wait for the reader

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head.stop()
        self._stalled.stop()


class _Timer:
    """Runs from its first start to its end or ``stop``; a start in between changes nothing."""

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, after_s: float, act: Callable[[], object]) -> None:
        if self._handle is None:
            self._handle = loop.call_later(after_s, act)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None
