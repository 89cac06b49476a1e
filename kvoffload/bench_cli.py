"""``kvoffload bench``: flags, no logic."""

import sys
from typing import Any

import typer

from kvoffload import flags
from kvoffload.bench import flags as bench_flags

app = typer.Typer(help="Speed beside the ceilings of this machine and peers.", no_args_is_help=True)


@app.command()
def decode(
    ctx: typer.Context,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None, context: bench_flags.Context = "8k",
    batch: bench_flags.Batch = 1, read_tokens: bench_flags.ReadTokens = None, budget: flags.Budget = None,
    steps: bench_flags.Steps = 32, peers: bench_flags.Peers = "all", gate_context: bench_flags.GateContext = None,
    kernels: bench_flags.Kernels = 0, device_max: bench_flags.DeviceMax = None,
    hit_share: bench_flags.HitShare = None, offload: flags.Offload = None,
    nvme_dir: flags.NvmeDir = None, cpu_max: flags.CpuMax = None, selector: flags.Selector = None,
    completion: flags.Completion = None, policy: flags.Policy = None, index: flags.Index = None,
    gpu_cache: flags.GpuCache = None, page_size: flags.PageSize = None, sinks: flags.Sinks = None,
    recent: flags.Recent = None, settings: bench_flags.Set = None,
    config: flags.Config = None, json: flags.Json = False,
) -> None:  # fmt: skip
    """Time a decode step, beside the floor and peers. KV is filled directly, and compared with dense first."""
    from kvoffload.bench.command import run_decode

    raise typer.Exit(run_decode(ctx.params, config, _output(json)))


@app.command()
def prefill(
    ctx: typer.Context,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None, context: bench_flags.Context = "8k",
    runs: bench_flags.Runs = 3, peers: bench_flags.PrefillPeers = "stock", kernels: bench_flags.Kernels = 0,
    budget: flags.Budget = None,
    prefill_chunk: flags.PrefillChunk = None, device_max: bench_flags.DeviceMax = None, offload: flags.Offload = None,
    nvme_dir: flags.NvmeDir = None, selector: flags.Selector = None, completion: flags.Completion = None,
    index: flags.Index = None, page_size: flags.PageSize = None,
    settings: bench_flags.Set = None, config: flags.Config = None, json: flags.Json = False,
) -> None:  # fmt: skip
    """Time a prefill, beside the library's dense one. Ours with everything that it writes and summarises."""
    from kvoffload.bench.command import run_prefill

    raise typer.Exit(run_prefill(ctx.params, config, _output(json)))


@app.command()
def copy(
    ctx: typer.Context,
    launches: bench_flags.Launches = "64KiB,256KiB,1MiB,4MiB,16MiB,64MiB",
    chunks: bench_flags.Chunks = "256B,512B,1KiB,2KiB,4KiB,8KiB,16KiB", source: bench_flags.Source = None,
    device: flags.Device = None, json: flags.Json = False,
) -> None:  # fmt: skip
    """Time the gather from host memory, beside one copy. Chunks of all sizes against as many bytes in a row."""
    from kvoffload.bench.command import run_copy

    raise typer.Exit(run_copy(ctx.params, _output(json)))


@app.command()
def io(
    ctx: typer.Context,
    nvme_dir: bench_flags.Folder = None, mb: bench_flags.Mb = 512, seconds: bench_flags.Seconds = 1.0,
    engines: bench_flags.Engines = "threads,aio", json: flags.Json = False,
) -> None:  # fmt: skip
    """Time random page reads of the file store beside fio's."""
    from kvoffload.bench.command import run_io

    raise typer.Exit(run_io(ctx.params, _output(json)))


def _output(json: bool) -> Any:
    from rich.console import Console

    from kvoffload.bench.output import Output

    return Output(sys.stdout, Console(stderr=True, highlight=False), as_json=json)
