"""Where a benchmark's words go: ceilings first, one JSON object or tables last."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any, TextIO

from rich.console import Console

from kvoffload.bench.phases import Phases
from kvoffload.runtime.doctor import package_version
from kvoffload.runtime.terminal import ProgressView, write_json, write_table


@dataclass(frozen=True)
class Table:
    """A title, names of columns, and rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[tuple[str, ...]]


class Output:
    """Tables on ``out``; with ``as_json`` they go to the console, and ``out`` gets one object.
    ``phases`` are told as they end and are part of the object."""

    def __init__(self, out: TextIO, console: Console, *, as_json: bool) -> None:
        self._out, self._as_json = out, as_json
        self._tables: IO[str] = console.file if as_json else out
        self.view = ProgressView(console, quiet=False)
        self.phases = Phases(self.view.say)

    def tell_ceilings(self, rows: Iterable[tuple[str, str]]) -> None:
        """The first thing that a benchmark tells."""
        write_table(self._tables, "ceilings, measured now", ("what", "most"), rows)

    def finish(self, tables: Iterable[Table], values: dict[str, Any], notes: Iterable[str] = ()) -> None:
        """The figures, as they were asked for."""
        for table in tables:
            write_table(self._tables, table.title, table.header, table.rows)
        for note in notes:
            self._tables.write(note + "\n")
        if self._as_json:
            write_json(self._out, {**values, "seconds": self.phases.as_dict(), "versions": _versions()})


def _versions() -> dict[str, str | None]:
    return {name: package_version(name) for name in ("kvoffload", "torch", "transformers", "triton")}
