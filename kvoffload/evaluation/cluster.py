"""``kvoffload sweep --ray``: the parts of a sweep as tasks of a Ray cluster.

Parts meet on one file system: every node sees --out and the texts under the same names. What is done is on disk there,
so that a part whose node is lost goes on elsewhere, and a sweep that is broken off goes on with the same command.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from kvoffload.errors import KvoffloadError, UsageError
from kvoffload.evaluation.command import run_sweep
from kvoffload.evaluation.spec import Shard, load_spec
from kvoffload.settings import read_toml

_PATHS = ("text", "out")
_RETRIES = 3


def run_on_ray(
    flags: Mapping[str, Any],
    config_file: Path | None,
    out: TextIO,
    console: Console,
    *,
    parts: int | None,
    as_json: bool,
) -> int:
    """Measure ``parts`` of the work (one for each GPU, or each node without any) on the cluster of RAY_ADDRESS, or on
    this machine, and write the report of all."""
    given = merged(flags, config_file)
    spec = load_spec(given, None)
    if spec.shard != Shard():
        raise UsageError(f"shard: {spec.shard.number}/{spec.shard.count} is one part, and --ray does all of them")
    if find_spec("ray") is None:
        raise UsageError("--ray needs Ray: pip install 'kvoffload[ray]'")
    measure(given, parts, console)
    return run_sweep(given, None, out, console, as_json=as_json)


def merged(flags: Mapping[str, Any], config_file: Path | None) -> dict[str, Any]:
    """Flags before the file's values, with paths that mean the same on every node."""
    told = {name: value for name, value in flags.items() if value not in (None, [], ())}
    given = {**(read_toml(config_file) if config_file else {}), **told}
    for name in _PATHS:
        if name in given:
            given[name] = _absolute(given[name])
    return given


def measure(given: Mapping[str, Any], parts: int | None, console: Console) -> None:
    """Run all parts to their end; raises the first error of one, after the others are done."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    ray.init(ignore_reinit_error=True)
    has_gpus = bool(n_gpus := int(ray.cluster_resources().get("GPU", 0)))
    count = parts or n_gpus or len(ray.nodes())
    console.print(f"{count} parts on {len(ray.nodes())} nodes with {n_gpus} GPUs", highlight=False)
    task = ray.remote(num_cpus=1, num_gpus=int(has_gpus), max_retries=_RETRIES)(run_part)
    running = {task.remote(dict(given), Shard(i, count)): i for i in range(1, count + 1)}
    failures: list[Exception] = []
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        number = running.pop(done)
        try:
            ray.get(done)
            console.print(f"part {number}/{count} is done", highlight=False)
        except RayTaskError as error:
            failures.append(error.cause)
        except RayError as error:
            failures.append(KvoffloadError(f"part {number}/{count} was lost: {error}"))
    if failures:
        raise failures[0]


def run_part(given: dict[str, Any], shard: Shard) -> None:
    """One part, on the node that Ray chose; without pictures, which the last one draws."""
    told = {**given, "shard": f"{shard.number}/{shard.count}", "plots": False}
    run_sweep(told, None, StringIO(), Console(stderr=True, highlight=False), as_json=False)


def _absolute(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_absolute(item) for item in value]
    return str(Path(value).absolute())
