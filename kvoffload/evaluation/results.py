"""Samples on disk: one JSON object a line, appended as soon as it is known, so that a sweep goes on where it ended.

Every process writes a file of its own (``samples.jsonl``, or ``samples-2of4.jsonl`` for a part of the work) under a
lock, and reads those of all.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvoffload.errors import UsageError
from kvoffload.evaluation.spec import Shard


@dataclass(frozen=True)
class Result:
    """One sample in one cell. ``cell`` are the columns of its cell, ``cost`` those of Cost (None for dense)."""

    family: str
    key: str
    sample: str
    model: str
    task: str
    context: int
    seed: int
    commit: str
    cell: Mapping[str, Any]
    values: Mapping[str, float]
    n: int
    heads: Mapping[str, list[float]]
    cost: Mapping[str, float | None] | None


def results_file(folder: Path, shard: Shard) -> Path:
    """Where this process writes."""
    return folder / ("samples.jsonl" if shard.count == 1 else f"samples-{shard.number}of{shard.count}.jsonl")


def read_results(folder: Path) -> list[Result]:
    """All whole lines of all processes' files; of a sample that two of them did, the first."""
    found: dict[tuple[str, str], Result] = {}
    for file in sorted(folder.glob("samples*.jsonl")):
        for result in _read(file):
            found.setdefault((result.key, result.sample), result)
    return list(found.values())


@contextmanager
def appending(file: Path) -> Iterator["Appender"]:
    """The only writer of a file; raises UsageError if the folder cannot be written or another process is at it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a+b")
    except OSError as error:
        raise UsageError(f"out: {str(file.parent)!r} cannot be written: {error.strerror}") from None
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"out: another process writes {str(file)!r}; give each its own --shard i/n") from None
        _drop_fragment(opened)
        yield Appender(opened)


class Appender:
    """Appends whole lines, each batch of them flushed at once."""

    def __init__(self, opened: BinaryIO) -> None:
        self._file = opened

    def add(self, results: Iterable[Result]) -> None:
        lines = [json.dumps(asdict(result), ensure_ascii=False) + "\n" for result in results]
        self._file.write("".join(lines).encode())
        self._file.flush()


def _read(file: Path) -> Iterator[Result]:
    """A last line without its end belongs to a process that was stopped, or that is writing it."""
    *whole, _ = file.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            yield Result(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise UsageError(f"{str(file)!r} line {number} is no sample of a sweep: {error}") from None


def _drop_fragment(opened: BinaryIO) -> None:
    opened.seek(0)
    opened.truncate(opened.read().rfind(b"\n") + 1)
