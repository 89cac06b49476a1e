"""The figures of a decode benchmark, for people and for machines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvoffload.bench.ceilings import Ceilings
from kvoffload.bench.decode import DecodePlan, Measured
from kvoffload.bench.kernels import kernel_table
from kvoffload.bench.output import Table
from kvoffload.units import format_size

_HEADER = ("what", "sequences", "ms a step", "p90", "tok/s", "x floor", "KV on device", "peak")


@dataclass
class DecodeReport:
    """Figures as they come; ``runs`` has ours first."""

    model: str
    plan: DecodePlan
    ceilings: Ceilings
    config: Mapping[str, Any]
    gate: Mapping[str, float]
    runs: list[Measured] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "bench": "decode", "model": self.model, "context": self.plan.context, "batch": self.plan.batch,
            "ceilings": self.ceilings.as_dict(), "gate": dict(self.gate), "gate_context": self.plan.gate_context,
            "runs": {run.name: run.as_dict() for run in self.runs}, "speedup_over": self._speedups(),
            "completion_cost": self._completion_cost(), "left_out": self.left_out, "config": dict(self.config),
        }  # fmt: skip

    def tables(self) -> list[Table]:
        title = f"{self.model}: decode at {self.plan.context:,} tokens x {self.plan.batch}"
        kernels = [kernel_table(f"a step: {run.name}", run.kernels) for run in self.runs if run.kernels]
        return [Table(title, _HEADER, [_row(run) for run in self.runs]), *kernels]

    def notes(self) -> list[str]:
        imposed = [] if self.plan.hit_share is None else [f"page cache hits are imposed: {self.plan.hit_share:.0%}"]
        return imposed + [f"left out: {name}: {why}" for name, why in self.left_out.items()]

    def _speedups(self) -> dict[str, float]:
        """Our tokens a second over those of each peer."""
        return {run.name: round(self.runs[0].tokens_per_s / run.tokens_per_s, 3) for run in self.runs[1:]}

    def _completion_cost(self) -> float | None:
        """How much longer a step is than with selection alone, as a share of that."""
        alone = next((run for run in self.runs if run.name == "selection"), None)
        return None if alone is None else round(self.runs[0].step.median / alone.step.median - 1, 4)


def _row(run: Measured) -> tuple[str, ...]:
    peak = "-" if run.peak_bytes is None else format_size(run.peak_bytes)
    return (
        run.name, str(run.n_sequences), f"{run.step.median * 1e3:.2f}",
        f"{run.step.p90 * 1e3:.2f}", f"{run.tokens_per_s:.1f}", f"{run.ratio:.2f}", format_size(run.kv_bytes), peak,
    )  # fmt: skip
