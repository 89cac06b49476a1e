"""Engines move byte ranges of a file into memory; all of them satisfy ``base.Engine``."""

from .base import Engine, PendingRead, ReadJob
from .choice import available_engines, build_engine

__all__ = ["Engine", "PendingRead", "ReadJob", "available_engines", "build_engine"]
