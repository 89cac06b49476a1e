"""The flags that only ``kvoffload bench`` has."""

from pathlib import Path
from typing import Annotated

import typer

from kvoffload.flags import flag

Context = Annotated[str, typer.Option("--context", help="Tokens, such as 128k.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences.")]
ReadTokens = Annotated[
    int | None, flag("--read-tokens", help="Tokens read per step, layer and kv head; another name for --budget N.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps that are timed.")]
Runs = Annotated[int, typer.Option("--runs", min=1, help="Prefills that are timed.")]
GateContext = Annotated[
    str | None, flag("--gate-context", help="Tokens of the comparison with dense attention.", default="4k at most")
]
Peers = Annotated[
    str,
    typer.Option(
        "--peers",
        help="all, none, or by commas of dense (one CUDA graph, compiled as ours is), dynamic and offloaded "
        "(transformers' caches), selection, ahead and resident (ours without completion, with --look-ahead, and "
        "with --offload none).",
    ),
]
PrefillPeers = Annotated[str, typer.Option("--peers", help="stock or none.")]
Kernels = Annotated[int, typer.Option("--kernels", min=0, help="Also list so many kernels by device time.")]
HitShare = Annotated[
    float | None,
    typer.Option(
        "--hit-share", min=0, max=1, show_default=False,
        help="Impose this share of page cache hits (0 to 1), as measured on a real model.",
    ),
]  # fmt: skip
DeviceMax = Annotated[str | None, flag("--device-max", help="Let no more of the GPU's memory be used, such as 24G.")]
Set = Annotated[list[str] | None, flag("--set", help="Any other runtime setting, as cuda_graph=off; may be repeated.")]
Launches = Annotated[str, typer.Option("--launches", help="Bytes moved at once.")]
Chunks = Annotated[str, typer.Option("--chunks", help="Bytes of a chunk.")]
Source = Annotated[str | None, flag("--source", help="Host memory that chunks lie in.", default="1GiB, 64MiB on a CPU")]
Mb = Annotated[int, typer.Option("--mb", min=64, help="Size of the file, 10^6 bytes.")]
Engines = Annotated[str, typer.Option("--engines", help="threads, aio, aiofiles, uring and gds, by commas.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="Length of each measurement.")]
Folder = Annotated[Path | None, flag("--nvme-dir", help="Folder of the file.", default="a temporary folder")]
