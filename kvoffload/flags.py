"""How a flag of the command line is told, and the flags that several commands have or ``kvoffload generate`` alone.

Those that only ``kvoffload calibrate`` or ``kvoffload sweep`` has are in calibration/flags.py and evaluation/flags.py.
"""

from pathlib import Path
from typing import Annotated, Any

import typer


def flag(*names: str, help: str, default: str | bool = False) -> Any:
    """An option whose default is told but not set."""
    return typer.Option(*names, help=help, show_default=default)


Model = Annotated[
    str | None,
    flag("--model", "-m", help="Built-in name, folder, .gguf file or hub name."),
]
Revision = Annotated[str | None, flag("--revision", help="Hub revision.")]
TrustRemoteCode = Annotated[
    bool | None,
    flag("--trust-remote-code/--no-trust-remote-code", help="Run code of the model's repository.", default="off"),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    flag("--dtype", help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.", default="auto"),
]
Device = Annotated[str | None, flag("--device", help="auto, cpu, cuda or cuda:N.", default="auto")]

Offload = Annotated[str | None, flag("--offload", help="none, cpu or nvme.", default="cpu")]
NvmeDir = Annotated[
    Path | None,
    flag("--nvme-dir", help="Folder for page files.", default="a temporary folder, removed at exit"),
]
NvmeMax = Annotated[str | None, flag("--nvme-max", help="Cap on page files, such as 200G.")]
CpuMax = Annotated[
    str | None,
    flag("--cpu-max", help="Cap on KV in host memory, such as 16G; with --offload nvme, the size of a tier before it."),
]
NvmeFloor = Annotated[str | None, flag("--nvme-floor", help="Bytes that stay free on the disk; 256MiB unless given.")]
Budget = Annotated[
    str | None,
    flag("--budget", help="Read per step: 5% of the context, 2048 token-equivalents, or 16MiB.",
         default="5%, or 100% with --offload none"),
]  # fmt: skip
Selector = Annotated[
    str | None,
    flag("--selector", help="Which pages are read: transform, quantized, bounds, mean, anchored, spread, exact or "
         "uniform; options as in quantized:bits=4,group=64.", default="transform"),
]  # fmt: skip
Completion = Annotated[
    str | None,
    flag("--completion", help="What stands for the rest: regression, anchored, none, phi, pages, exact, page_mean, "
         "centroids, rank1, mean_value, moments, index_mass, sketch, keepkv or chelsea; options as in "
         "phi:features=128; with --gate several, joined by +. regression and sketch work with selector transform or "
         "quantized.",
         default="regression, or anchored with the other selectors"),
]  # fmt: skip
Policy = Annotated[
    str | None,
    flag("--policy", help="prhs, hshare, tokenselect, retro, resa, refresh or none; options as in prhs:block=8; "
         "several joined by +.", default="none"),
]  # fmt: skip
MaxDroppedMass = Annotated[
    str | None,
    flag("--max-dropped-mass", help="Read on until the estimated mass of what is not read is at most this share; or "
         "off.", default="off"),
]  # fmt: skip
DroppedMassCap = Annotated[
    str | None, flag("--dropped-mass-cap", help="Most that a step may read for that.", default="25%")
]
DroppedMassMisses = Annotated[
    str | None,
    flag("--dropped-mass-misses", help="Learn from audits how far to read on, so that a head misses the target in at "
         "most this share of them; or off.", default="off"),
]  # fmt: skip
Audit = Annotated[
    str | None,
    flag("--audit", help="Measure the dropped mass with a full read every so many steps; or off.", default="off"),
]
Gate = Annotated[
    bool | None,
    flag("--gate/--no-gate", help="Choose per head among the completions and abstaining.", default="off"),
]
GateQueries = Annotated[int | None, flag("--gate-queries", help="Queries a choice is made on.", default="64")]
GateMargin = Annotated[
    float | None,
    flag("--gate-margin", help="Share of the error of abstaining that a completion must take away.", default="0"),
]
GateRecheck = Annotated[
    str | None,
    flag("--gate-recheck", help="Choose anew every so many generated tokens, with a full read; or off.",
         default="off"),
]  # fmt: skip
Reanchor = Annotated[
    str | None,
    flag("--reanchor", help="Rebuild summaries around newer queries every so many generated tokens; or off.",
         default="1024"),
]  # fmt: skip
Pool = Annotated[
    str | None,
    flag("--pool", help="layer: one budget for all kv heads of a layer; none: one each.", default="layer"),
]
HeadFloor = Annotated[
    float | None, flag("--head-floor", help="Of a kv head's equal part of --pool layer, what it gets for certain.")
]
HeadCap = Annotated[str | None, flag("--head-cap", help="And at most, in multiples of it; or off.")]
LayerBudgets = Annotated[
    Path | None, flag("--layer-budgets", help="Shares of the budget by layer, made by kvoffload calibrate --by-layer.")
]
Sinks = Annotated[int | None, flag("--sinks", help="First tokens kept on the device.", default="16")]
Recent = Annotated[int | None, flag("--recent", help="Newest tokens kept on the device.", default="64")]
PageSize = Annotated[str | None, flag("--page-size", help="Tokens a page, 1 to 256; auto: by the disk.", default="16")]
Index = Annotated[str | None, flag("--index", help="Where the index lives: device or cpu.", default="device")]
GpuCache = Annotated[str | None, flag("--gpu-cache", help="Size of the device's page cache, or off.", default="off")]
PrefillChunk = Annotated[str | None, flag("--prefill-chunk", help="Tokens a prefill chunk, or auto.", default="auto")]
IoEngine = Annotated[str | None, flag("--io-engine", help="threads, aio, aiofiles, uring or gds.", default="threads")]
Direct = Annotated[str | None, flag("--direct", help="Direct I/O: auto, on or off.", default="auto")]

LookAhead = Annotated[
    bool | None,
    flag("--look-ahead/--no-look-ahead", help="Choose a layer's pages, and fetch them, while the layer before it "
         "computes, by a guess of its queries.", default="off"),
]  # fmt: skip
Prefetch = Annotated[
    float | None,
    flag("--prefetch", help="Bring next step's likely pages to the tier of --cpu-max early: so much more than the "
         "budget.", default="0"),
]  # fmt: skip
Fetch = Annotated[
    str | None,
    flag("--fetch", help="wait for late pages, or deadline: leave them to the completion.", default="wait"),
]
FetchMs = Annotated[float | None, flag("--fetch-ms", help="How long deadline waits, in each layer.", default="1")]
CudaGraph = Annotated[
    str | None,
    flag("--cuda-graph", default="auto",
         help="Replay decode steps as one CUDA graph: auto, where that can be, on, of several ranks too, or off."),
]  # fmt: skip
Compile = Annotated[
    str | None,
    flag("--compile", help="Compile the model's own small operations (norms, activations, rotary) in steps of a CUDA "
         "graph, and make one product of q, k and v, and of gate and up: on, off, or auto: in serve and bench.",
         default="auto"),
]  # fmt: skip
Verify = Annotated[
    bool | None,
    flag("--verify/--no-verify", help="Compare every slice read from files with its checksum.", default="off"),
]
SessionFile = Annotated[
    Path | None,
    flag("--session", help="Folder FILE.kvo to go on with, and to save to at the end; made if it is not there."),
]  # fmt: skip
SessionReadonly = Annotated[
    bool | None, flag("--session-readonly/--no-session-readonly", help="Save nothing to the session.", default="off")
]

Prompt = Annotated[str | None, flag("--prompt", "-p", help="The prompt; follows the file's text.")]
PromptFile = Annotated[Path | None, flag("--prompt-file", help="Text to begin with; - is stdin.")]
System = Annotated[str | None, flag("--system", help="System message.")]
ChatTemplate = Annotated[
    bool | None,
    flag("--chat-template/--no-chat-template", help="Use the tokenizer's chat template.", default="on"),
]
StrictContext = Annotated[
    bool | None,
    flag("--strict-context/--no-strict-context", help="Refuse prompts beyond the model's context.", default="off"),
]  # fmt: skip
MaxNewTokens = Annotated[int | None, flag("--max-new-tokens", help="Tokens to generate at most.", default="256")]
Temperature = Annotated[float | None, flag("--temperature", help="0 takes the likeliest token.", default="0")]
TopP = Annotated[float | None, flag("--top-p", help="Nucleus sampling.", default="1")]
TopK = Annotated[int | None, flag("--top-k", help="Sample among the K likeliest; 0 is all.", default="0")]
Seed = Annotated[int | None, flag("--seed", help="Seed of the sampling.", default="a new one")]
Stop = Annotated[list[str] | None, flag("--stop", help="Stop at this text; may be repeated.")]
NumBeams = Annotated[int | None, flag("--num-beams", help="Only 1 is supported.", default="1")]

PpSize = Annotated[
    int | None,
    flag("--pp-size", help="Under torchrun: 1 shares the heads of every layer out over the processes, their number "
         "shares out the layers.", default="1"),
]  # fmt: skip
SelfTest = Annotated[
    bool | None,
    flag("--self-test/--no-self-test", help="Compare the loaded model with its own attention first.", default="on"),
]  # fmt: skip
Config = Annotated[
    Path | None,
    flag("--config", help="TOML file of defaults; KVOFFLOAD_* variables and flags go before it."),
]
Json = Annotated[bool, flag("--json", help="One JSON object as the last line of stdout.")]
Quiet = Annotated[bool | None, flag("--quiet/--no-quiet", "-q", help="No progress, no statistics.", default="off")]
PrintConfig = Annotated[bool, flag("--print-config", help="Print the merged settings and leave.")]
