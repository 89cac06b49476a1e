"""Cells of a sweep and the keys under which their samples are kept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.spec import SweepSpec

DENSE = "dense"
_MEANINGLESS = frozenset(
    {"nvme_dir", "nvme_max", "prefill_chunk", "io_engine", "direct", "device", "self_test",
     "strict_context", "dtype", "pp_size"}
)  # fmt: skip
"""Fields that change where and how fast a cell runs, not what it gives."""


@dataclass(frozen=True)
class Cell:
    """A method at a budget; without a ``config`` it is dense attention."""

    method: str
    selector: str
    completion: str
    budget: str
    config: RuntimeConfig | None

    def columns(self) -> dict[str, Any]:
        """What a sample's line says of its cell, for people and for the report."""
        gate, pool = (self.config.gate, self.config.pool) if self.config else (False, "")
        return {
            "method": self.method, "selector": self.selector, "completion": self.completion, "gate": gate,
            "pool": pool, "budget": self.budget,
        }  # fmt: skip


def make_cells(spec: SweepSpec) -> list[Cell]:
    """Dense attention first, then methods x budgets in the order given."""
    cells = [Cell(DENSE, DENSE, DENSE, "100%", None)]
    for method in spec.compared:
        for budget in spec.budgets_of(method):
            config = method.config(budget, spec.common)
            cells.append(Cell(method.name, method.selector, method.completion, budget, config))
    return cells


@dataclass(frozen=True)
class Family:
    """What all cells of a sweep share: samples of different families are never put together.

    ``weights`` is the hash of the model's weights, ``task`` everything of the task that changes results.
    """

    weights: str
    dtype: str
    task: Mapping[str, Any]
    common: Mapping[str, Any]

    @staticmethod
    def of(spec: SweepSpec, weights: str, dtype: str) -> "Family":
        common = {name: value for name, value in spec.common.items() if name not in _MEANINGLESS}
        return Family(weights, dtype, spec.task.identity(), common)

    @property
    def key(self) -> str:
        return _hash([self.weights, self.dtype, self.task, self.common])

    def cell_key(self, cell: Cell, context: int) -> str:
        """Differs wherever the result of a sample may differ."""
        config: Any = DENSE
        if cell.config is not None:
            config = cell.config.model_dump(mode="json", exclude=set(_MEANINGLESS))
            config = {**config, "calibrations": [str(found.header) for found in cell.config.calibrations]}
        return _hash([self.key, context, config])


def _hash(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())
