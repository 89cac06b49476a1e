"""The sweep itself: what is still to be done, and doing it. Every batch is prefilled once and measured in all cells
that lack one of its samples."""

import gc
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvoffload import __version__
from kvoffload.config import RuntimeConfig
from kvoffload.errors import OutOfRoomError
from kvoffload.evaluation.cells import Cell, Family, make_cells
from kvoffload.evaluation.results import Appender, Result
from kvoffload.evaluation.spec import Shard, SweepSpec
from kvoffload.evaluation.tasks.base import Batch, Measured, OpenBatch
from kvoffload.models.catalog import LoadedModel

Done = set[tuple[str, str]]
OnCell = Callable[["Work", Cell, Measured, float], None]
"""What is told of a measurement, and the seconds that it took."""


@dataclass(frozen=True)
class Work:
    """A batch of a context and the cells it has yet to be measured in."""

    context: int
    batch: Batch
    cells: tuple[Cell, ...]


def plan_work(spec: SweepSpec, family: Family, tokenizer: Any, done: Iterable[Result]) -> list[Work]:
    """What this process has to do, in order; no work of the model."""
    known = {(result.key, result.sample) for result in done}
    every = [(context, batch) for context in spec.contexts for batch in spec.task.batches(tokenizer, context)]
    cells = make_cells(spec)
    mine = []
    for number, (context, batch) in enumerate(every):
        picked = share(cells, number, len(every), spec.shard)
        lacking = tuple(c for c in picked if not _has(known, family.cell_key(c, context), batch))
        if lacking:
            mine.append(Work(context, batch, lacking))
    return mine


def share(cells: Sequence[Cell], number: int, n_batches: int, shard: Shard) -> Sequence[Cell]:
    """The cells of batch ``number`` that a part of the work does: batches are dealt out whole where there are enough,
    else several parts share each and deal out its cells."""
    groups = max(d for d in range(1, shard.count + 1) if shard.count % d == 0 and d <= max(n_batches, 1))
    group, place = (shard.number - 1) % groups, (shard.number - 1) // groups
    return cells[place :: shard.count // groups] if number % groups == group else ()


def run_work(
    work: Iterable[Work], spec: SweepSpec, family: Family, loaded: LoadedModel, out: Appender, on_cell: OnCell
) -> None:
    """Measure and append, cell by cell. Raises OutOfRoomError if the device's memory does not hold a batch."""
    plain = {"offload": "none", "selector": "uniform", "completion": "none"}
    told = {name: value for name, value in spec.set.items() if name == "cuda_graph"}  # of the dense cell too
    source = RuntimeConfig(**{**spec.common, **plain, **told})
    for item in work:
        try:
            with item.batch.open(loaded, source) as opened:
                for cell in item.cells:
                    started = time.perf_counter()
                    measured = _measure(opened, cell)
                    took_s = time.perf_counter() - started
                    out.add(_results(spec, family, loaded.name, item, cell, measured))
                    on_cell(item, cell, measured, took_s)
                    if torch.cuda.is_initialized():
                        gc.collect()  # a cache and its layers hold each other, and by replays little else is collected
        except torch.OutOfMemoryError as error:
            raise OutOfRoomError(
                f"{len(item.batch.samples)} sequences of {item.context:,} tokens do not fit on the device: give a "
                "smaller --batch; what is done is kept"
            ) from error


def _measure(opened: OpenBatch, cell: Cell) -> Measured:
    return opened.dense() if cell.config is None else opened.measure(cell.config)


def _has(known: Done, key: str, batch: Batch) -> bool:
    return all((key, sample) in known for sample in batch.samples)


def _results(spec: SweepSpec, family: Family, model: str, work: Work, cell: Cell, measured: Measured) -> list[Result]:
    blank = Result(
        family=family.key, key=family.cell_key(cell, work.context), sample="", model=model, task=spec.task.kind,
        context=work.context, seed=spec.task.seed, commit=commit(), cell=cell.columns(), values={}, n=0, heads={},
        cost=None if measured.cost is None else asdict(measured.cost),
    )  # fmt: skip
    return [
        replace(blank, sample=r.sample, values=dict(r.values), n=r.n, heads={k: list(v) for k, v in r.heads.items()})
        for r in measured.records
    ]


@cache
def commit() -> str:
    """The source's git commit where it is a checkout of its own ("-dirty" with changes), else the package's version."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return __version__
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
        )
    except OSError:
        return __version__
    return asked.stdout.strip() if asked.returncode == 0 else __version__
