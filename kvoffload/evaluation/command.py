"""What ``kvoffload sweep`` does, from flags to an exit code.

Everything that can be refused is refused before any weights load; a sweep that is done already loads none.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.cautions import cautions, small_reads
from kvoffload.evaluation.cells import Family, make_cells
from kvoffload.evaluation.entropy import entropy_bins
from kvoffload.evaluation.plots import check_plots, draw_entropy, draw_sweep
from kvoffload.evaluation.progress import SweepView
from kvoffload.evaluation.report import Report
from kvoffload.evaluation.results import Result, appending, read_results, results_file
from kvoffload.evaluation.spec import SweepSpec, load_spec
from kvoffload.evaluation.summary import CellResult, Row, make_cell_results, make_rows
from kvoffload.evaluation.sweep import Work, plan_work, run_work
from kvoffload.models.catalog import (
    ModelSource,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve,
)
from kvoffload.models.fingerprint import check_calibrations, weights_hash
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.terminal import ProgressView

_LEVEL = "the interval of 95% of 1,000 resamples of the texts"


def run_sweep(
    flags: Mapping[str, Any], config_file: Path | None, out: TextIO, console: Console, *, as_json: bool
) -> int:
    """Measure what is not on disk yet, then write sweep.json, sweep.csv, report.md and the pictures from all that is
    there; flags that are None or empty were not given."""
    spec = load_spec({name: value for name, value in flags.items() if value not in (None, [], ())}, config_file)
    if spec.plots:
        check_plots()
    source = resolve(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    device, model_config = pick_device(spec.device), load_config(source)
    view, configs = ProgressView(console, quiet=False), [cell.config for cell in make_cells(spec) if cell.config]
    for config in configs:
        check_calibrations(config.calibrations, source)
    for doubt in dict.fromkeys(doubt for config in configs for doubt in config.doubts):
        view.warn(doubt)
    limit = int(model_config.get_text_config(decoder=True).max_position_embeddings)
    if max(spec.contexts) > limit:
        view.warn(f"a context of {max(spec.contexts):,} tokens is beyond the {limit:,} that the model was made for")
    with appending(results_file(spec.out, spec.shard)) as appender:
        with view.showing():
            tokenizer = load_tokenizer(source, view.load)
            dtype = pick_dtype(spec.dtype, model_config, device)
            family = Family.of(spec, weights_hash(source), str(dtype).removeprefix("torch."))
            found = _of_family(spec, family)
            work = plan_work(spec, family, tokenizer, found)
        methods = {method.name for method in spec.compared} | {str(result.cell["method"]) for result in found}
        for caution in cautions(spec, methods):
            view.warn(caution)
        if work:
            with view.showing():
                loaded = load_model(source, dtype=dtype, device=device, tokenizer=tokenizer, on_progress=view.load)
            Runtime(loaded, RuntimeConfig(**spec.common))
            with SweepView(console, _n_cells(work), spec.task.metrics).showing() as shown:
                run_work(work, spec, family, loaded, appender, shown.cell)
    rows = write_report(spec, source, family)
    _tell(spec, rows, work, out, as_json=as_json)
    return 0


def write_report(spec: SweepSpec, source: ModelSource, family: Family) -> list[Row]:
    """Everything but the samples, made anew from them: all cells in the folder that belong to this sweep's family."""
    order = [method.name for method in spec.compared]
    cells = make_cell_results(_of_family(spec, family), order)
    rows = make_rows(cells, spec.task.metrics)
    _replace(spec.out / "sweep.json", _json(rows))
    _replace(spec.out / "sweep.csv", _csv(rows))
    report = Report(
        title=f"{source.name}: {spec.task.kind}",
        notes=_notes(spec, family, cells),
        cells=cells,
        metrics=spec.task.metrics,
        baseline=spec.baseline_method.name,
        seed=spec.task.seed,
    )
    _replace(spec.out / "report.md", report.markdown())
    if spec.plots:
        draw_sweep(spec.out / "sweep.png", rows, spec.task.metrics)
        if bins := entropy_bins(cells):
            draw_entropy(spec.out / "entropy.png", bins)
    return rows


def _of_family(spec: SweepSpec, family: Family) -> list[Result]:
    return [result for result in read_results(spec.out) if result.family == family.key]


def _n_cells(work: Sequence[Work]) -> int:
    return sum(len(item.cells) for item in work)


def _notes(spec: SweepSpec, family: Family, cells: Sequence[CellResult]) -> list[str]:
    options = ", ".join(f"{name} {value}" for name, value in spec.task.identity().items() if name != "kind")
    samples = sorted({len(cell.results) for cell in cells})
    commits = sorted({result.commit for cell in cells for result in cell.results})
    return [
        f"{family.dtype}, offload {spec.offload}, pages of {spec.page_size} tokens, {spec.sinks} sinks, "
        f"{spec.recent} recent tokens; page cache off",
        f"task {spec.task.kind}: {options}",
        f"samples a cell: {' to '.join(str(n) for n in dict.fromkeys([samples[0], samples[-1]])) if samples else 0}",
        f"read and charged are shares of the context, from the runtime's meter; in brackets {_LEVEL}",
        f"measured at {', '.join(commits)}",
        *cautions(spec, {cell.method for cell in cells}),
        *small_reads(spec, cells),
    ]


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole; several parts of a sweep may come to it at once."""
    half = file.with_name(f"{file.name}.{os.getpid()}")
    half.write_text(text, encoding="utf-8")
    half.replace(file)


def _json(rows: Sequence[Row]) -> str:
    return "[\n" + ",\n".join(json.dumps(row.as_dict()) for row in rows) + "\n]\n"


def _csv(rows: Sequence[Row]) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, [column.name for column in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() for row in rows)
    return written.getvalue()


def _tell(spec: SweepSpec, rows: Sequence[Row], work: Sequence[Work], out: TextIO, *, as_json: bool) -> None:
    if as_json:
        told = {"out": str(spec.out), "task": spec.task.kind, "measured": _n_cells(work), "rows": len(rows)}
        out.write(json.dumps(told) + "\n")
    else:
        out.write(f"{spec.out / 'report.md'}: {len(rows)} rows, {_n_cells(work)} measurements made now\n")
