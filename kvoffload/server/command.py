"""``kvoffload serve``, from what the command line gave to an exit code.

Everything that can be refused is refused before any weights load, the address included: the socket is bound first.
"""

import socket
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import Field, SecretStr
from rich.console import Console

from kvoffload.config import Size
from kvoffload.errors import UsageError
from kvoffload.models.catalog import LoadedModel, load_config, load_model, load_tokenizer, pick_dtype
from kvoffload.runtime.command import check_machine, settled
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.limits import find_limits
from kvoffload.runtime.terminal import ProgressView
from kvoffload.settings import Settings, load_settings_of

if TYPE_CHECKING:
    from kvoffload.server.service import Service

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_CHUNK = {"cpu": 256, "cuda": 2048}  # a prefill chunk is the longest that others wait
_LOCAL = {"127.0.0.1", "::1", "localhost"}


class ServeSettings(Settings):
    """What the command line can be told, and what only a server needs."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: SecretStr | None = Field(default=None, min_length=1)
    max_running: int = Field(default=64, ge=1)
    max_queue: int = Field(default=64, ge=0)
    max_body: Size = 16 << 20
    body_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    request_timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    grace: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    keep_sessions: int = Field(default=4, ge=0)
    sessions: Path | None = None


def run_serve(given: Mapping[str, Any], config: Path | None, console: Console) -> int:
    """Serve until a signal comes; open requests get --grace seconds then."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise UsageError(f"serve needs {', '.join(missing)}: pip install 'kvoffload[serve]'")
    settings = settled(load_settings_of(ServeSettings, given, config))
    _check_alone(settings)
    view = ProgressView(console, quiet=settings.quiet)
    source, device = check_machine(settings, view)
    with bind(settings.host, settings.port) as listener:
        with view.showing():
            tokenizer = load_tokenizer(source, view.load)
            dtype = pick_dtype(settings.dtype, load_config(source), device)
            loaded = load_model(source, dtype=dtype, device=device, tokenizer=tokenizer, on_progress=view.load)
            service = build(loaded, settings)
            shares = service.scheduler.shares_forwards
        host, port = listener.getsockname()[:2]
        if settings.host not in _LOCAL and settings.api_key is None:
            view.warn(f"everybody who reaches {settings.host} can use this server: give --api-key")
        if not shares:
            view.say(f"{loaded.name} decodes requests one after the other: they cannot share a forward")
        view.say(f"serving {loaded.name} on http://{host}:{port}/v1")
        listen(service, listener, settings.grace)
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises UsageError for an address that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"host {host!r} cannot be used: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def build(loaded: LoadedModel, settings: ServeSettings) -> "Service":
    """The service of a loaded model, by what is free now."""
    from kvoffload.server.metrics import Metrics
    from kvoffload.server.room import Planner
    from kvoffload.server.scheduler import Limits, Scheduler
    from kvoffload.server.service import Options, Service
    from kvoffload.server.stored import StoredSessions

    device, config = loaded.model.device, settings.runtime().for_long()
    if config.nvme_dir is None and settings.sessions is not None:  # where page files can be linked into sessions
        config = config.model_copy(update={"nvme_dir": settings.sessions})
    if config.prefill_chunk is None:
        config = config.model_copy(update={"prefill_chunk": _CHUNK.get(device.type, _CHUNK["cuda"])})
    planner = Planner(loaded.config, config, dtype=loaded.model.dtype, device=device)
    room = planner.room(find_limits(device, config.nvme_dir, with_disk=config.offload == "nvme"))
    limits = Limits(settings.max_running, settings.max_queue, settings.keep_sessions, room)
    metrics = Metrics()
    options = Options(
        model_name=loaded.name,
        sampling=settings.sampling(),
        chat_template=settings.chat_template,
        api_key=None if settings.api_key is None else settings.api_key.get_secret_value(),
        is_local=settings.host in _LOCAL,
        max_body=settings.max_body,
        body_timeout_s=settings.body_timeout,
        request_timeout_s=settings.request_timeout,
    )
    runtime = Runtime(loaded, config)
    stored = None if settings.sessions is None else StoredSessions(settings.sessions, runtime)
    scheduler = Scheduler(runtime, limits, metrics, stored=stored)
    return Service(loaded, scheduler, planner, metrics, options, stored=stored)


def listen(service: "Service", listener: socket.socket, grace_s: float) -> None:
    """Serve until a signal; then whoever waits is sent away at once, whoever runs has ``grace_s``."""
    import uvicorn

    from kvoffload.server.patience import server_config

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.scheduler.drain(grace_s)
            super().handle_exit(sig, frame)

    wait_s = max(round(grace_s + 1), 1)
    config = server_config(service, log_level="warning", timeout_keep_alive=5, timeout_graceful_shutdown=wait_s)
    Server(config).run(sockets=[listener])


def _check_alone(settings: ServeSettings) -> None:
    """Refuse what only makes sense for one prompt."""
    for name in ("prompt", "prompt_file", "system", "session"):
        if getattr(settings, name) is not None:
            raise UsageError(f"{name}: a server takes it from its requests")
