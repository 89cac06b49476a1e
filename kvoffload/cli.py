"""The command line: flags and exit codes, no logic. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 failure, 2 bad input, 3 out of room (disk, memory, descriptors, a cap), 4 bytes came back damaged,
130 Ctrl-C.
Every flag defaults to None, so that a flag which was not given leaves the environment and the file in force.
"""

import errno
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from kvoffload import bench_cli, flags, session_cli
from kvoffload.calibration import flags as calibration_flags
from kvoffload.errors import KvoffloadError
from kvoffload.evaluation import flags as sweep_flags
from kvoffload.flags import flag
from kvoffload.harness import flags as harness_flags
from kvoffload.models.parallel import check_alone, find_ranks
from kvoffload.server import flags as server_flags

_STORAGE_CODES = {"CapacityError": 3, "IntegrityError": 4, "UnavailableError": 2}
_SYSTEM_CODES = {errno.EACCES: 2, errno.EPERM: 2, errno.EROFS: 2, errno.EMFILE: 3, errno.ENFILE: 3, errno.ENOSPC: 3}

app = typer.Typer(
    name="kvoffload",
    help="Long-context LLM inference with the KV cache in host memory or NVMe files.",
    add_completion=False,
    rich_markup_mode=None,  # plain help, which is there in half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(session_cli.app, name="session")
app.add_typer(bench_cli.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(ctx: typer.Context, version: Annotated[bool, flag("--version", help="Print the version.")] = False) -> None:
    if version:
        from kvoffload import __version__

        typer.echo(f"kvoffload {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)
    if ctx.invoked_subcommand not in ("generate", "env"):
        check_alone(f"kvoffload {ctx.invoked_subcommand}")


@app.command()
def generate(
    ctx: typer.Context,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None, offload: flags.Offload = None,
    nvme_dir: flags.NvmeDir = None, nvme_max: flags.NvmeMax = None, nvme_floor: flags.NvmeFloor = None,
    cpu_max: flags.CpuMax = None, session: flags.SessionFile = None, session_readonly: flags.SessionReadonly = None,
    verify: flags.Verify = None, prefetch: flags.Prefetch = None, look_ahead: flags.LookAhead = None,
    fetch: flags.Fetch = None, fetch_ms: flags.FetchMs = None,
    cuda_graph: flags.CudaGraph = None, compile: flags.Compile = None,
    budget: flags.Budget = None, selector: flags.Selector = None, completion: flags.Completion = None,
    policy: flags.Policy = None, max_dropped_mass: flags.MaxDroppedMass = None,
    dropped_mass_cap: flags.DroppedMassCap = None, dropped_mass_misses: flags.DroppedMassMisses = None,
    audit: flags.Audit = None,
    gate: flags.Gate = None, gate_queries: flags.GateQueries = None, gate_margin: flags.GateMargin = None,
    gate_recheck: flags.GateRecheck = None, reanchor: flags.Reanchor = None, pool: flags.Pool = None,
    head_floor: flags.HeadFloor = None, head_cap: flags.HeadCap = None,
    layer_budgets: flags.LayerBudgets = None, sinks: flags.Sinks = None, recent: flags.Recent = None,
    page_size: flags.PageSize = None, index: flags.Index = None, gpu_cache: flags.GpuCache = None,
    pp_size: flags.PpSize = None,
    prefill_chunk: flags.PrefillChunk = None, io_engine: flags.IoEngine = None, direct: flags.Direct = None,
    prompt: flags.Prompt = None, prompt_file: flags.PromptFile = None, system: flags.System = None,
    chat_template: flags.ChatTemplate = None, strict_context: flags.StrictContext = None,
    max_new_tokens: flags.MaxNewTokens = None, temperature: flags.Temperature = None, top_p: flags.TopP = None,
    top_k: flags.TopK = None, seed: flags.Seed = None, stop: flags.Stop = None, num_beams: flags.NumBeams = None,
    self_test: flags.SelfTest = None, config: flags.Config = None, json: flags.Json = False, quiet: flags.Quiet = None,
    print_config: flags.PrintConfig = False,
) -> None:  # fmt: skip
    """Generate text from a prompt. The text streams to stdout, everything else goes to stderr."""
    settings = _settings(ctx)
    from kvoffload.runtime import command

    if print_config:
        raise typer.Exit(command.show_config(settings, sys.stdout))
    raise typer.Exit(command.run_generate(settings, sys.stdout, _console()))


@app.command()
def chat(
    ctx: typer.Context,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None, offload: flags.Offload = None,
    nvme_dir: flags.NvmeDir = None, nvme_max: flags.NvmeMax = None, nvme_floor: flags.NvmeFloor = None,
    cpu_max: flags.CpuMax = None, session: flags.SessionFile = None, session_readonly: flags.SessionReadonly = None,
    budget: flags.Budget = None, selector: flags.Selector = None, completion: flags.Completion = None,
    policy: flags.Policy = None, sinks: flags.Sinks = None, recent: flags.Recent = None,
    page_size: flags.PageSize = None, index: flags.Index = None, gpu_cache: flags.GpuCache = None,
    prefill_chunk: flags.PrefillChunk = None, io_engine: flags.IoEngine = None, direct: flags.Direct = None,
    system: flags.System = None, chat_template: flags.ChatTemplate = None, strict_context: flags.StrictContext = None,
    max_new_tokens: flags.MaxNewTokens = None, temperature: flags.Temperature = None, top_p: flags.TopP = None,
    top_k: flags.TopK = None, seed: flags.Seed = None, stop: flags.Stop = None, self_test: flags.SelfTest = None,
    config: flags.Config = None, quiet: flags.Quiet = None,
) -> None:  # fmt: skip
    """Talk to a model line by line, on one session. /help says which commands there are."""
    settings = _settings(ctx)
    from kvoffload.runtime.chat import run_chat

    raise typer.Exit(run_chat(settings, sys.stdin, sys.stdout, _console()))


@app.command()
def plan(
    ctx: typer.Context,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None,
    context: Annotated[str | None, flag("--context", help="Tokens, such as 128k.", default="the model's")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    offload: flags.Offload = None, nvme_dir: flags.NvmeDir = None, nvme_max: flags.NvmeMax = None,
    cpu_max: flags.CpuMax = None, budget: flags.Budget = None, selector: flags.Selector = None,
    completion: flags.Completion = None, gate: flags.Gate = None, layer_budgets: flags.LayerBudgets = None,
    sinks: flags.Sinks = None, recent: flags.Recent = None, page_size: flags.PageSize = None, index: flags.Index = None,
    gpu_cache: flags.GpuCache = None, config: flags.Config = None, json: flags.Json = False,
) -> None:  # fmt: skip
    """Say what a context needs and whether it fits. Nothing is allocated."""
    settings = _settings(ctx)
    from kvoffload.runtime import command

    raise typer.Exit(command.run_plan(settings, context, batch, sys.stdout))


@app.command()
def calibrate(
    ctx: typer.Context,
    data: calibration_flags.Data = None, out: calibration_flags.Out = Path("calibration.safetensors"),
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None, completion: calibration_flags.Completion = None,
    by_layer: calibration_flags.ByLayer = False, budget: flags.Budget = None, selector: flags.Selector = None,
    pool: flags.Pool = None, sinks: flags.Sinks = None, recent: flags.Recent = None, page_size: flags.PageSize = None,
    context: calibration_flags.Context = None, sequences: calibration_flags.Sequences = None,
    queries: calibration_flags.Queries = None, budgets: calibration_flags.Budgets = None,
    features: calibration_flags.Features = None, family: calibration_flags.Family = None,
    key_maps: calibration_flags.KeyMaps = None, steps: calibration_flags.Steps = None,
    rate: calibration_flags.Rate = None, seed: calibration_flags.Seed = None,
    host_max: calibration_flags.HostMax = None, config: flags.Config = None, json: flags.Json = False,
    quiet: flags.Quiet = None,
) -> None:  # fmt: skip
    """Fit a completion to a model's heads on text. Or with --by-layer measure how layers share a budget."""
    settings = _settings(ctx)
    from kvoffload.calibration.command import run_calibrate

    raise typer.Exit(run_calibrate(settings, ctx.params, data or [], out, sys.stdout, _console()))


@app.command()
def sweep(
    ctx: typer.Context,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    task: sweep_flags.Task = None, text: sweep_flags.Text = None, texts: sweep_flags.Texts = None,
    positions: sweep_flags.Positions = None, batch: sweep_flags.Batch = None, seed: sweep_flags.Seed = None,
    contexts: sweep_flags.Contexts = None, budgets: sweep_flags.Budgets = None,
    baseline_budgets: sweep_flags.BaselineBudgets = None, selectors: sweep_flags.Selectors = None,
    completions: sweep_flags.Completions = None, policies: sweep_flags.Policies = None,
    pools: sweep_flags.Pools = None, methods: sweep_flags.Methods = None,
    baseline: sweep_flags.Baseline = None, settings: sweep_flags.Set = None, offload: flags.Offload = None,
    page_size: flags.PageSize = None, sinks: flags.Sinks = None, recent: flags.Recent = None, dtype: flags.Dtype = None,
    device: flags.Device = None, shard: sweep_flags.Shard = None, ray: sweep_flags.Ray = False,
    parts: sweep_flags.Parts = None, plots: sweep_flags.Plots = None,
    out: sweep_flags.Out = None, config: sweep_flags.SweepConfig = None, json: flags.Json = False,
) -> None:  # fmt: skip
    """Compare methods: quality against what is read. One model and task, every figure from the real runtime."""
    own = ("settings", "config", "json", "ray", "parts")
    given = {**{name: value for name, value in ctx.params.items() if name not in own}, "set": settings}
    if ray:
        from kvoffload.evaluation.cluster import run_on_ray

        raise typer.Exit(run_on_ray(given, config, sys.stdout, _console(), parts=parts, as_json=json))
    from kvoffload.evaluation.command import run_sweep

    raise typer.Exit(run_sweep(given, config, sys.stdout, _console(), as_json=json))


@app.command()
def serve(
    ctx: typer.Context,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None,
    host: server_flags.Host = None, port: server_flags.Port = None, api_key: server_flags.ApiKey = None,
    max_running: server_flags.MaxRunning = None, max_queue: server_flags.MaxQueue = None,
    max_body: server_flags.MaxBody = None, body_timeout: server_flags.BodyTimeout = None,
    request_timeout: server_flags.RequestTimeout = None, grace: server_flags.Grace = None,
    keep_sessions: server_flags.KeepSessions = None, sessions: server_flags.Sessions = None,
    offload: flags.Offload = None, nvme_dir: flags.NvmeDir = None, nvme_max: flags.NvmeMax = None,
    nvme_floor: flags.NvmeFloor = None, cpu_max: flags.CpuMax = None, verify: flags.Verify = None,
    budget: flags.Budget = None, selector: flags.Selector = None, completion: flags.Completion = None,
    policy: flags.Policy = None, sinks: flags.Sinks = None, recent: flags.Recent = None,
    page_size: flags.PageSize = None, index: flags.Index = None, gpu_cache: flags.GpuCache = None,
    prefill_chunk: flags.PrefillChunk = None, io_engine: flags.IoEngine = None, direct: flags.Direct = None,
    chat_template: flags.ChatTemplate = None, max_new_tokens: flags.MaxNewTokens = None,
    temperature: flags.Temperature = None, top_p: flags.TopP = None, top_k: flags.TopK = None,
    self_test: flags.SelfTest = None, config: flags.Config = None, quiet: flags.Quiet = None,
) -> None:  # fmt: skip
    """Serve the OpenAI dialect over HTTP. Requests of different lengths share one model, step by step."""
    from kvoffload.server.command import run_serve

    given = {name: value for name, value in ctx.params.items() if name != "config" and value is not None}
    raise typer.Exit(run_serve(given, config, _console()))


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    tasks: harness_flags.Tasks = None, include: harness_flags.Include = None, limit: harness_flags.Limit = None,
    fewshot: harness_flags.Fewshot = None, contexts: harness_flags.Contexts = None,
    batch_size: harness_flags.BatchSize = None, max_length: harness_flags.MaxLength = None,
    apply_chat_template: harness_flags.ApplyChatTemplate = None, out: harness_flags.Out = None,
    model: flags.Model = None, revision: flags.Revision = None, trust_remote_code: flags.TrustRemoteCode = None,
    dtype: flags.Dtype = None, device: flags.Device = None, offload: flags.Offload = None,
    nvme_dir: flags.NvmeDir = None, nvme_max: flags.NvmeMax = None, cpu_max: flags.CpuMax = None,
    budget: flags.Budget = None, selector: flags.Selector = None, completion: flags.Completion = None,
    policy: flags.Policy = None, max_dropped_mass: flags.MaxDroppedMass = None, gate: flags.Gate = None,
    pool: flags.Pool = None, layer_budgets: flags.LayerBudgets = None, sinks: flags.Sinks = None,
    recent: flags.Recent = None, page_size: flags.PageSize = None, index: flags.Index = None,
    prefill_chunk: flags.PrefillChunk = None, self_test: flags.SelfTest = None,
    config: flags.Config = None, json: flags.Json = False, quiet: flags.Quiet = None,
) -> None:  # fmt: skip
    """Run tasks of lm-evaluation-harness."""
    from kvoffload.harness.command import run_eval

    given = {n: value for n, value in ctx.params.items() if n not in ("config", "json") and value not in (None, [], ())}
    if json:
        given["output"] = "json"
    raise typer.Exit(run_eval(given, config, sys.stdout, _console()))


@app.command()
def env(
    require: Annotated[
        str, flag("--require", help="Features that must be: cuda, pinned, triton, o_direct, aio, uring, aiofiles, gds.")
    ] = "",
    nvme_dir: flags.NvmeDir = None,
    json: flags.Json = False,
) -> None:
    """Say what this machine offers. Exit code 1 if a required feature is missing."""
    from kvoffload.runtime import command

    required = [name.strip() for name in require.split(",") if name.strip()]
    raise typer.Exit(command.run_env(required, nvme_dir, sys.stdout, as_json=json))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every failure is one line on stderr."""
    try:
        with redirect_stdout(cast(TextIO, _Stdout(sys.stdout))):
            code = int(typer.main.get_command(app).main(arguments, "kvoffload", standalone_mode=False) or 0)
            sys.stdout.flush()
            return code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except typer.TyperException as error:
        return _fail(error.format_message(), 2)
    except KvoffloadError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(str(error), _SYSTEM_CODES.get(error.errno or 0, 1))
    except _storage_error() as error:
        return _fail(str(error), _STORAGE_CODES.get(type(error).__name__, 1))


class _Stdout:
    """Standard output whose errors say that they are its."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, text: str) -> int:
        with _told():
            return self._inner.write(text)

    def flush(self) -> None:
        with _told():
            self._inner.flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"standard output cannot be written: {error.strerror}") from error


def main() -> None:
    """The entry point of the installed command; a polite kill or a lost terminal ends it as cleanly as Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    sys.exit(run())


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _storage_error() -> type[Exception]:
    """Imported when something was raised, because the storage package loads torch."""
    from kvoffload_storage.errors import StorageError

    return StorageError


def _settings(ctx: typer.Context) -> Any:
    from kvoffload.settings import Settings, load_settings

    given = {name: value for name, value in ctx.params.items() if value not in (None, [], ())}
    known = {name: value for name, value in given.items() if name in Settings.model_fields}
    if ctx.params.get("json"):
        known["output"] = "json"
    return load_settings(known, ctx.params["config"])


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _fail(message: str, exit_code: int) -> int:
    rank = find_ranks().rank
    print(f"error (rank {rank}): " if rank else "error: ", " ".join(message.split()), sep="", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
