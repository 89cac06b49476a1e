"""The command line: flags and exit codes, no logic. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 failure, 2 bad input, 3 out of room (disk, memory, a cap), 4 bytes came back damaged, 130 Ctrl-C.
Every flag defaults to None, so that a flag which was not given leaves the environment and the file in force.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvoffload.errors import KvoffloadError

_STORAGE_CODES = {"CapacityError": 3, "IntegrityError": 4}

app = typer.Typer(
    name="kvoffload",
    help="Long-context LLM inference with the KV cache in host memory or NVMe files.",
    add_completion=False,
    rich_markup_mode=None,  # plain help, which is there in half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flag(*names: str, help: str, default: str | bool = False) -> Any:
    """An option whose default is told but not set."""
    return typer.Option(*names, help=help, show_default=default)


Model = Annotated[
    str | None,
    _flag("--model", "-m", help="Built-in name, folder, .gguf file or hub name."),
]
Revision = Annotated[str | None, _flag("--revision", help="Hub revision.")]
TrustRemoteCode = Annotated[
    bool | None,
    _flag("--trust-remote-code/--no-trust-remote-code", help="Run code of the model's repository.", default="off"),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    _flag("--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.", default="auto"),
]
Device = Annotated[str | None, _flag("--device", help="auto, cpu, cuda or cuda:N.", default="auto")]

Offload = Annotated[str | None, _flag("--offload", help="none, cpu or nvme.", default="cpu")]
NvmeDir = Annotated[
    Path | None,
    _flag("--nvme-dir", help="Folder for page files.", default="a temporary folder, removed at exit"),
]
NvmeMax = Annotated[str | None, _flag("--nvme-max", help="Cap on page files, such as 200G.")]
CpuMax = Annotated[str | None, _flag("--cpu-max", help="Cap on KV in host memory, such as 16G.")]
Budget = Annotated[
    str | None,
    _flag("--budget", help="Read per step: 5% of the context, 2048 token-equivalents, or 16MiB.",
          default="5%, or 100% with --offload none"),
]  # fmt: skip
Selector = Annotated[
    str | None,
    _flag("--selector", help="Which pages are read: quantized, bounds, mean, anchored, spread, exact or uniform; "
          "options as in quantized:bits=4,group=64.", default="quantized"),
]  # fmt: skip
Completion = Annotated[
    str | None,
    _flag("--completion", help="What stands for the rest: anchored, none, phi, pages or exact; options as in "
          "phi:features=128; with --gate several, joined by +.", default="anchored"),
]  # fmt: skip
Gate = Annotated[
    bool | None,
    _flag("--gate/--no-gate", help="Choose per head among the completions and abstaining.", default="off"),
]
Pool = Annotated[
    str | None,
    _flag("--pool", help="layer: one budget for all kv heads of a layer; none: one each.", default="layer"),
]
Sinks = Annotated[int | None, _flag("--sinks", help="First tokens kept on the device.", default="16")]
Recent = Annotated[int | None, _flag("--recent", help="Newest tokens kept on the device.", default="64")]
PageSize = Annotated[int | None, _flag("--page-size", help="Tokens a page, 4 to 256.", default="16")]
Index = Annotated[str | None, _flag("--index", help="Where the index lives: device or cpu.", default="device")]
GpuCache = Annotated[str | None, _flag("--gpu-cache", help="Size of the device's page cache, or off.", default="off")]
PrefillChunk = Annotated[str | None, _flag("--prefill-chunk", help="Tokens a prefill chunk, or auto.", default="auto")]
IoEngine = Annotated[str | None, _flag("--io-engine", help="threads, aiofiles or uring.", default="threads")]
Direct = Annotated[str | None, _flag("--direct", help="Direct I/O: auto, on or off.", default="auto")]

Prompt = Annotated[str | None, _flag("--prompt", "-p", help="The prompt; follows the file's text.")]
PromptFile = Annotated[Path | None, _flag("--prompt-file", help="Text to begin with; - is stdin.")]
System = Annotated[str | None, _flag("--system", help="System message.")]
ChatTemplate = Annotated[
    bool | None,
    _flag("--chat-template/--no-chat-template", help="Use the tokenizer's chat template.", default="on"),
]
StrictContext = Annotated[
    bool | None,
    _flag("--strict-context/--no-strict-context", help="Refuse prompts beyond the model's context.", default="off"),
]  # fmt: skip
MaxNewTokens = Annotated[int | None, _flag("--max-new-tokens", help="Tokens to generate at most.", default="256")]
Temperature = Annotated[float | None, _flag("--temperature", help="0 takes the likeliest token.", default="0")]
TopP = Annotated[float | None, _flag("--top-p", help="Nucleus sampling.", default="1")]
TopK = Annotated[int | None, _flag("--top-k", help="Sample among the K likeliest; 0 is all.", default="0")]
Seed = Annotated[int | None, _flag("--seed", help="Seed of the sampling.", default="a new one")]
Stop = Annotated[list[str] | None, _flag("--stop", help="Stop at this text; may be repeated.")]
NumBeams = Annotated[int | None, _flag("--num-beams", help="Only 1 is supported.", default="1")]

SelfTest = Annotated[
    bool | None,
    _flag("--self-test/--no-self-test", help="Compare the loaded model with its own attention first.", default="on"),
]  # fmt: skip
Config = Annotated[
    Path | None,
    _flag("--config", help="TOML file of defaults; KVOFFLOAD_* variables and flags go before it."),
]
Json = Annotated[bool, _flag("--json", help="One JSON object as the last line of stdout.")]
Quiet = Annotated[bool | None, _flag("--quiet/--no-quiet", "-q", help="No progress, no statistics.", default="off")]
PrintConfig = Annotated[bool, _flag("--print-config", help="Print the merged settings and leave.")]


@app.callback(invoke_without_command=True)
def _root(ctx: typer.Context, version: Annotated[bool, _flag("--version", help="Print the version.")] = False) -> None:
    if version:
        from kvoffload import __version__

        typer.echo(f"kvoffload {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


@app.command()
def generate(
    ctx: typer.Context,
    model: Model = None, revision: Revision = None, trust_remote_code: TrustRemoteCode = None,
    dtype: Dtype = None, device: Device = None,
    offload: Offload = None, nvme_dir: NvmeDir = None, nvme_max: NvmeMax = None, cpu_max: CpuMax = None,
    budget: Budget = None, selector: Selector = None, completion: Completion = None, gate: Gate = None,
    pool: Pool = None, sinks: Sinks = None, recent: Recent = None, page_size: PageSize = None,
    index: Index = None, gpu_cache: GpuCache = None, prefill_chunk: PrefillChunk = None,
    io_engine: IoEngine = None, direct: Direct = None,
    prompt: Prompt = None, prompt_file: PromptFile = None, system: System = None, chat_template: ChatTemplate = None,
    strict_context: StrictContext = None, max_new_tokens: MaxNewTokens = None, temperature: Temperature = None,
    top_p: TopP = None, top_k: TopK = None, seed: Seed = None, stop: Stop = None, num_beams: NumBeams = None,
    self_test: SelfTest = None, config: Config = None, json: Json = False, quiet: Quiet = None,
    print_config: PrintConfig = False,
) -> None:  # fmt: skip
    """Generate text from a prompt; the text streams to stdout, everything else goes to stderr."""
    settings = _settings(ctx)
    from kvoffload.runtime import command

    if print_config:
        raise typer.Exit(command.show_config(settings, sys.stdout))
    raise typer.Exit(command.run_generate(settings, sys.stdout, _console()))


@app.command()
def plan(
    ctx: typer.Context,
    model: Model = None, revision: Revision = None, trust_remote_code: TrustRemoteCode = None,
    dtype: Dtype = None, device: Device = None,
    context: Annotated[str | None, _flag("--context", help="Tokens, such as 128k.", default="the model's")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    offload: Offload = None, nvme_dir: NvmeDir = None, nvme_max: NvmeMax = None, cpu_max: CpuMax = None,
    budget: Budget = None, selector: Selector = None, completion: Completion = None, gate: Gate = None,
    sinks: Sinks = None, recent: Recent = None, page_size: PageSize = None, index: Index = None,
    gpu_cache: GpuCache = None, config: Config = None, json: Json = False,
) -> None:  # fmt: skip
    """Say what a context needs and whether it fits, before anything is allocated."""
    settings = _settings(ctx)
    from kvoffload.runtime import command

    raise typer.Exit(command.run_plan(settings, context, batch, sys.stdout))


@app.command()
def env(
    require: Annotated[
        str, _flag("--require", help="Features that must be there: cuda, pinned, triton, o_direct, uring, aiofiles.")
    ] = "",
    nvme_dir: NvmeDir = None,
    json: Json = False,
) -> None:
    """Say what this machine offers; exit code 1 if a required feature is missing."""
    from kvoffload.runtime import command

    required = [name.strip() for name in require.split(",") if name.strip()]
    raise typer.Exit(command.run_env(required, nvme_dir, sys.stdout, as_json=json))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; every failure is one line on stderr."""
    try:
        return int(typer.main.get_command(app).main(arguments, "kvoffload", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except typer.TyperException as error:
        return _fail(error.format_message(), 2)
    except KvoffloadError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(str(error), 1)
    except _storage_error() as error:
        return _fail(str(error), _STORAGE_CODES.get(type(error).__name__, 1))


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
    flags = {name: value for name, value in given.items() if name in Settings.model_fields}
    if ctx.params["json"]:
        flags["output"] = "json"
    return load_settings(flags, ctx.params["config"])


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _fail(message: str, exit_code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    main()
