"""What people see: progress and statistics on stderr, tables on stdout."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from kvoffload.models.progress import LoadProgress
from kvoffload.runtime.events import Progress as PrefillProgress
from kvoffload.runtime.plan import Plan
from kvoffload.runtime.stats import Stats
from kvoffload.units import format_size


class ProgressView:
    """Bars on a terminal, plain lines elsewhere, nothing at all when ``quiet``."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    @contextmanager
    def showing(self) -> Iterator["ProgressView"]:
        """Bars live inside this block and are gone after it."""
        if self._quiet or not self._console.is_terminal:
            yield self
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
        with Progress(*columns, console=self._console, transient=True) as self._bars:
            yield self
        self._bars, self._tasks = None, {}

    def load(self, progress: LoadProgress) -> None:
        """One step of getting the model ready."""
        if progress.total is None:
            self.say(progress.step)
            return
        unit = format_size if progress.total > 1 << 20 else str
        self._update(progress.step, progress.done, progress.total, f"{unit(progress.done)} of {unit(progress.total)}")

    def tell(self, line: str) -> None:
        """What was asked for, on stderr in any case."""
        self._console.print(line, markup=False, soft_wrap=True)

    def error(self, line: str) -> None:
        self.tell("error: " + " ".join(line.split()))

    def prefill(self, progress: PrefillProgress) -> None:
        """A bar, and a line at the end."""
        self.prefill_bar(progress)
        if progress.done_tokens == progress.total_tokens:
            self.say(f"prefill {_amount(progress)}")

    def prefill_bar(self, progress: PrefillProgress) -> None:
        self._update("prefill", progress.done_tokens, progress.total_tokens, _amount(progress))

    def say(self, line: str) -> None:
        """A line on stderr, unless quiet."""
        if not self._quiet:
            self._console.print(line, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """A line on stderr in any case."""
        self._console.print(f"warning: {line}", markup=False, soft_wrap=True)

    def _update(self, name: str, done: int, total: int, amount: str) -> None:
        if self._bars is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, amount=amount)
        self._bars.update(self._tasks[name], completed=done, total=total, amount=amount)


def _amount(progress: PrefillProgress) -> str:
    return f"{progress.done_tokens:,}/{progress.total_tokens:,} tok, {format_size(progress.bytes_moved)} moved"


def statistics_line(stats: Stats) -> str:
    """One line on a finished generation; what was not measured is left out."""
    parts = [f"{stats.prompt_tokens:,} prompt tok"]
    if stats.restored_tokens:
        parts.append(f"{stats.restored_tokens:,} tok restored, {stats.computed_tokens:,} computed")
    if stats.ttft_s is not None:
        parts.append(f"TTFT {stats.ttft_s:.2f} s")
    speed = f" at {1000 / stats.tpot_ms:.1f} tok/s" if stats.tpot_ms else ""
    parts.append(f"{stats.new_tokens:,} tok{speed}")
    if stats.read_tokens_per_step is not None and stats.read_share is not None:
        parts.append(f"read {stats.read_tokens_per_step:.0f} tok a step ({stats.read_share:.1%} of the context)")
    if stats.charged_share is not None:
        parts.append(f"charged {stats.charged_share:.1%}")
    parts += [f"{tier} {format_size(n)} read" for tier, n in stats.bytes_read.items() if n]
    if stats.hit_rate is not None:
        parts.append(f"hits {stats.hit_rate:.0%}")
    if stats.late_share:
        parts.append(f"{stats.late_share:.1%} of slices late")
    if stats.completion_mass is not None:
        parts.append(f"completion mass {stats.completion_mass:.3f}")
    if stats.gate_abstain_share is not None:
        parts.append(f"{stats.gate_abstain_share:.0%} of heads abstain")
    if stats.scored_share is not None and stats.scored_share < 1:
        parts.append(f"{stats.scored_share:.0%} scored")
    if stats.dropped_mass is not None:
        target = f" of at most {stats.max_dropped_mass:g}" if stats.max_dropped_mass is not None else ""
        held = f", held {stats.dropped_mass_held:.1%}" if stats.dropped_mass_held is not None else ""
        parts.append(f"dropped mass {stats.dropped_mass:.3f}{target}{held}")
    if stats.clamped_entries:
        parts.append(f"{stats.clamped_entries:,} entries clamped")
    return " · ".join([*parts, f"resident {format_size(stats.resident_bytes)}"])


def write_json(out: TextIO, values: dict[str, Any]) -> None:
    """One object on one line."""
    out.write(json.dumps(values) + "\n")


def write_table(out: IO[str], title: str, header: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """A title and a plain table, never cut to the width of a terminal."""
    made = Table(*header, box=None)
    for row in rows:
        made.add_row(*row)
    console = Console(file=out, highlight=False, soft_wrap=True, markup=False)
    console.print(title)
    console.print(made)


def plan_title(model: str, plan: Plan) -> str:
    """What a plan is of."""
    sequences = f" x {plan.batch} sequences" if plan.batch > 1 else ""
    return (
        f"{model}: {plan.context:,} tokens{sequences}, {format_size(plan.footprint.bytes_per_token)} a token, "
        f"KV {format_size(plan.kv_bytes)}, offload {plan.offload}, budget {plan.budget_tokens:,.0f} tok a step"
    )
