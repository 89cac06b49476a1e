"""A server of the ``tiny`` shape on a loopback port, in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn

from kvoffload.models.catalog import LoadedModel
from kvoffload.server.command import ServeSettings, bind, build
from kvoffload.server.patience import server_config
from kvoffload.server.service import Service
from kvoffload.settings import load_settings_of

SMALL = {
    "model": "tiny", "sinks": 4, "recent": 8, "page_size": 4, "budget": "25%", "self_test": False, "prefill_chunk": 64,
    "keep_sessions": 0, "max_new_tokens": 16,
}  # fmt: skip


@dataclass
class Served:
    """Where it is, and what is inside."""

    url: str
    service: Service

    @property
    def scheduler(self) -> Any:
        return self.service.scheduler

    def client(self, **fields: Any) -> openai.OpenAI:
        return openai.OpenAI(**({"base_url": self.url + "/v1", "api_key": "none", "max_retries": 0} | fields))

    def http(self, **fields: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **fields)

    def until(self, told: Any, *, within_s: float = 20.0) -> None:
        """Wait for something that another thread brings about."""
        limit_s = time.monotonic() + within_s
        while not told():
            assert time.monotonic() < limit_s, "it did not come about"
            time.sleep(0.005)

    def until_idle(self) -> None:
        self.until(lambda: self.scheduler.n_running == self.scheduler.n_waiting == 0)


@contextmanager
def serving(loaded: LoadedModel, **fields: Any) -> Iterator[Served]:
    """Runs until the block ends; then every session has to be given back."""
    settings = load_settings_of(ServeSettings, SMALL | fields)
    service = build(loaded, settings)
    listener = bind("127.0.0.1", 0)
    config = server_config(service, log_level="critical", timeout_graceful_shutdown=1, timeout_keep_alive=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
    try:
        served.until(lambda: server.started)
        yield served
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        assert service.scheduler.n_running == 0
