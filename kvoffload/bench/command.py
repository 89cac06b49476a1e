"""What ``kvoffload bench`` does, from flags to an exit code."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kvoffload_storage.disk import measure_disk

from kvoffload.bench.begin import begin, disk_folder
from kvoffload.bench.ceilings import calibrate
from kvoffload.bench.clock import Clock
from kvoffload.bench.copies import check_sizes, copy_table, measure_copies
from kvoffload.bench.decode import DecodeBench
from kvoffload.bench.disk import disk_table, lacks_fio, measure_reads
from kvoffload.bench.options import bench_settings, count, decode_plan, engine_names, peer_names, sizes
from kvoffload.bench.output import Output
from kvoffload.bench.prefill import PrefillBench, prefill_tables, prefill_values
from kvoffload.bench.prompt_kv import PromptKv
from kvoffload.bench.report import DecodeReport
from kvoffload.bench.runs import Contender, ours, peers, stock
from kvoffload.errors import OutOfRoomError, UsageError
from kvoffload.models.catalog import pick_device

_SOURCE = {"cuda": "1GiB", "cpu": "64MiB"}


def run_decode(flags: Mapping[str, Any], config_file: Path | None, output: Output) -> int:
    """Calibrate, compare with dense attention, then time ours and the peers in turn."""
    settings = bench_settings(flags, config_file)
    plan, names = decode_plan(flags, settings), peer_names(flags["peers"])
    bench = begin(settings, flags, output, context=plan.context, batch=plan.batch)
    config, model = bench.runtime.config, bench.loaded.model
    with output.phases.phase("prompt"):
        kv = PromptKv(model, plan.batch, plan.context)
    contenders = [ours("ours", model, config, kv), *peers(names, model, config, kv)]
    runner = DecodeBench(plan, bench.clock, bench.ceilings, bench.vocabulary, output.phases)
    fused, eager = (stock("library", model, kv, offloading=False, eager=eager) for eager in (False, True))
    errors = runner.gate(fused, eager, contenders)
    output.view.say("equal to dense with everything read: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    report = DecodeReport(bench.loaded.name, plan, bench.ceilings, config.model_dump(mode="json"), errors)
    for contender in contenders:
        _measure(runner, contender, report, output)
    output.finish(report.tables(), report.as_dict(), report.notes())
    return 0


def _measure(runner: DecodeBench, contender: Contender, report: DecodeReport, output: Output) -> None:
    """Ours must run; a peer that cannot is reported."""
    if contender.lacks:
        report.left_out[contender.name] = contender.lacks
        return
    try:
        run = runner.measure(contender)
    except OutOfRoomError as error:
        if not report.runs:
            raise
        report.left_out[contender.name] = str(error)
        return
    report.runs.append(run)
    output.view.say(f"{run.name}: {run.step.median * 1e3:.2f} ms a step, {run.ratio:.2f} x floor")


def run_prefill(flags: Mapping[str, Any], config_file: Path | None, output: Output) -> int:
    """Compare our prefill with the library's, then time both."""
    settings, context = bench_settings(flags, config_file), count("context", flags["context"])
    names = peer_names(flags["peers"], ("stock",))
    bench = begin(settings, flags, output, context=context, batch=1)
    runner = PrefillBench(bench, context, int(flags["runs"]), int(flags["kernels"]))
    with output.phases.phase("gate"):
        ours_s, stock_s, error = runner.gate()
    output.view.say(f"equal to the library's prefill: {error:.1e}")
    with output.phases.phase("timing"):
        runs = [runner.measure("ours", runner.ours, ours_s)]
        runs += [runner.measure("stock", runner.stock, stock_s) for _ in names]
    output.finish(prefill_tables(bench, context, runs), prefill_values(bench, context, error, runs))
    return 0


def run_copy(flags: Mapping[str, Any], output: Output) -> int:
    """The gather kernel against one pinned copy, launch by launch."""
    clock = Clock(pick_device(flags["device"] or "auto"))
    launches, chunks = sizes("launches", flags["launches"]), sizes("chunks", flags["chunks"])
    (source_bytes,) = sizes("source", flags["source"] or _SOURCE[clock.device.type])
    check_sizes(launches, chunks, source_bytes)
    ceilings = calibrate(clock, torch.bfloat16 if clock.has_graphs else torch.float32)
    output.tell_ceilings(ceilings.rows())
    rows = list(measure_copies(clock, launches, chunks, source_bytes))
    values = {"bench": "copy", "ceilings": ceilings.as_dict(), "source_bytes": source_bytes, "graph": clock.has_graphs}
    told = [row.as_dict(ceilings.link_gb_s) for row in rows]
    output.finish([copy_table(rows, ceilings.link_gb_s)], {**values, "rows": told})
    return 0


def run_io(flags: Mapping[str, Any], output: Output) -> int:
    """The file store's random reads against fio's."""
    folder, seconds = Path(disk_folder(flags["nvme_dir"])), float(flags["seconds"])
    engines = engine_names(flags["engines"], folder)
    if not folder.is_dir():
        raise UsageError(f"nvme_dir: {str(folder)!r} is no folder")
    disk = asdict(measure_disk(folder, seconds))
    output.tell_ceilings([(name, str(value)) for name, value in disk.items()])
    rows = list(measure_reads(folder, int(flags["mb"]) * 10**6, seconds, [n for n, why in engines.items() if not why]))
    left_out = {name: why for name, why in {**engines, "fio": lacks_fio()}.items() if why}
    notes = [f"left out: {name}: {why}" for name, why in left_out.items()]
    values = {"bench": "io", "ceilings": disk, "rows": [row.as_dict() for row in rows], "left_out": left_out}
    output.finish([disk_table(rows)], values, notes)
    return 0
