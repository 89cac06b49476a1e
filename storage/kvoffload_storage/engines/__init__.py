"""Engines move byte ranges of a file into memory; all of them satisfy ``base.Engine``."""

from .base import Engine, PendingRead, ReadBatch
from .choice import available_engines, build_engine, why_not

__all__ = ["Engine", "PendingRead", "ReadBatch", "available_engines", "build_engine", "why_not"]
