"""What a benchmark is told, checked before anything loads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from kvoffload_storage.engines import why_not

from kvoffload.bench.decode import WARM_UP, DecodePlan
from kvoffload.bench.runs import PEERS
from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.settings import Settings, load_settings
from kvoffload.units import parse_count, parse_size

_GATE_TOKENS = 4096


def bench_settings(flags: Mapping[str, Any], config_file: Path | None) -> Settings:
    """The runtime's settings from flags, with ``--set`` and ``--read-tokens`` among them."""
    known = {name: value for name, value in flags.items() if name in Settings.model_fields and value is not None}
    for item in flags.get("settings") or ():
        name, equals, value = item.partition("=")
        if name not in RuntimeConfig.model_fields:
            _refuse("set", f"{item!r} is no setting; accepted names: {', '.join(RuntimeConfig.model_fields)}")
        known[name] = value if equals else "true"
    if (read_tokens := flags.get("read_tokens")) is not None:
        if "budget" in known:
            _refuse("read_tokens", f"{read_tokens} and --budget {known['budget']} say the same thing: give one")
        known["budget"] = str(read_tokens)
    settings = load_settings(known, config_file)
    if not settings.model:
        _refuse("model", "give one with --model, such as llama-3.1-8b-shape")
    return settings


def decode_plan(flags: Mapping[str, Any], settings: Settings) -> DecodePlan:
    """Raises UsageError where there would be nothing to read before the first step."""
    context, steps = count("context", flags["context"]), int(flags["steps"])
    least = settings.sinks + settings.recent + 4 * settings.page_size
    if context < least + WARM_UP + steps:
        _refuse("context", f"{context} tokens are too few for {steps} steps behind {least} tokens of anchors and pages")
    given = flags.get("gate_context")
    gate = min(context, _GATE_TOKENS) if given is None else count("gate_context", given)
    if gate < least:
        _refuse("gate_context", f"{gate} tokens are too few: give {least} at least")
    return DecodePlan(context, int(flags["batch"]), steps, gate, int(flags["kernels"]), _hit_share(flags, settings))


def _hit_share(flags: Mapping[str, Any], settings: Settings) -> float | None:
    share: float | None = flags.get("hit_share")
    if share is not None and settings.gpu_cache is None:
        _refuse("hit_share", f"{share} needs a page cache to hit: give --gpu-cache")
    return share


def peer_names(given: str, known: Sequence[str] = tuple(PEERS)) -> tuple[str, ...]:
    """``all``, ``none`` or names by commas."""
    if given in ("all", "none", ""):
        return tuple(known) if given == "all" else ()
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in known:
            _refuse("peers", f"{name!r} is unknown; accepted: all, none, {', '.join(known)}")
    return names


def engine_names(given: str, folder: Path) -> dict[str, str]:
    """I/O engines by commas, each with why it cannot be used in that folder ("" if it can)."""
    known = get_args(RuntimeConfig.model_fields["io_engine"].annotation)
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            _refuse("engines", f"{name!r} is unknown; accepted: {', '.join(known)}")
    return {name: why_not(name, folder) for name in names}


def count(name: str, value: str) -> int:
    """Tokens; raises UsageError by the flag's name."""
    try:
        return parse_count(value)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def sizes(name: str, given: str) -> tuple[int, ...]:
    """Sizes by commas, at least one byte each, as in 64KiB,1MiB."""
    try:
        found = tuple(parse_size(part) for part in given.split(","))
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    if not all(found):
        _refuse(name, f"{given!r} has a size of zero")
    return found


def _refuse(name: str, why: str) -> NoReturn:
    raise UsageError(f"{name}: {why}")
