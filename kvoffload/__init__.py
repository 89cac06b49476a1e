"""Long-context LLM inference with the KV cache in host memory or NVMe files: Top-K pages plus softmax completion.

Importing this package loads nothing heavy; the public names load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvoffload.config import RuntimeConfig, SamplingConfig
    from kvoffload.errors import KvoffloadError
    from kvoffload.models.cache import OffloadCache
    from kvoffload.runtime.engine import Runtime
    from kvoffload.runtime.events import Progress, StreamEvent
    from kvoffload.runtime.session import Session
    from kvoffload.runtime.stats import Stats
    from kvoffload.runtime.stock import generate

__version__ = "0.1.0"

_HOME = {
    "KvoffloadError": "kvoffload.errors",
    "OffloadCache": "kvoffload.models.cache",
    "Progress": "kvoffload.runtime.events",
    "Runtime": "kvoffload.runtime.engine",
    "RuntimeConfig": "kvoffload.config",
    "SamplingConfig": "kvoffload.config",
    "Session": "kvoffload.runtime.session",
    "Stats": "kvoffload.runtime.stats",
    "StreamEvent": "kvoffload.runtime.events",
    "generate": "kvoffload.runtime.stock",
}

__all__ = [
    "KvoffloadError",
    "OffloadCache",
    "Progress",
    "Runtime",
    "RuntimeConfig",
    "SamplingConfig",
    "Session",
    "Stats",
    "StreamEvent",
    "__version__",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kvoffload' has no attribute {name!r}")
