"""Engines by name."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UnavailableError
from .aio import AioEngine, why_no_aio
from .async_files import AsyncFilesEngine
from .base import Engine
from .gds import GdsEngine, why_no_gds
from .threads import ThreadsEngine
from .uring import UringEngine, why_no_uring

_ENGINES: dict[str, Callable[[int], Engine]] = {
    "threads": ThreadsEngine,
    "aio": AioEngine,
    "aiofiles": AsyncFilesEngine,
    "uring": UringEngine,
    "gds": GdsEngine,
}


def why_not(name: str, directory: Path | None = None) -> str:
    """Why the engine of that name cannot read files of that directory, or "" if it can; asked once, it may take a child
    process. UnavailableError when there is no such engine."""
    if name not in _ENGINES:
        raise UnavailableError(f"engine {name!r}, expected one of {', '.join(_ENGINES)}")
    match name:
        case "aio":
            return why_no_aio()
        case "uring":
            return why_no_uring()
        case "gds":
            return why_no_gds(directory)
    return ""


def available_engines(directory: Path | None = None) -> dict[str, str]:
    """Name of every engine, with "" if it can be used here and else why not."""
    return {name: why_not(name, directory) for name in _ENGINES}


def build_engine(name: str, *, n_threads: int, directory: Path | None = None) -> Engine:
    """The engine of that name; UnavailableError when there is none or it cannot be used here."""
    if reason := why_not(name, directory):
        raise UnavailableError(f"engine {name}: {reason}")
    return _ENGINES[name](n_threads)
