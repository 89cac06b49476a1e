"""Engines by name."""

from collections.abc import Callable

from ..errors import UnavailableError
from .aio import AioEngine, why_no_aio
from .async_files import AsyncFilesEngine
from .base import Engine
from .threads import ThreadsEngine
from .uring import UringEngine, why_no_uring

_ENGINES: dict[str, Callable[[int], Engine]] = {
    "threads": ThreadsEngine,
    "aio": AioEngine,
    "aiofiles": AsyncFilesEngine,
    "uring": UringEngine,
}


def available_engines() -> dict[str, str]:
    """Name of every engine, with "" if it can be used here and else why not. May start a child process, once."""
    return {"threads": "", "aio": why_no_aio(), "aiofiles": "", "uring": why_no_uring()}


def build_engine(name: str, *, n_threads: int) -> Engine:
    """The engine of that name; UnavailableError when there is none or it cannot be used here."""
    if name not in _ENGINES:
        raise UnavailableError(f"engine {name!r}, expected one of {', '.join(_ENGINES)}")
    return _ENGINES[name](n_threads)
