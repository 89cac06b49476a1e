"""What ``kvoffload calibrate`` does, from settings to an exit code.

Everything that can be refused is refused before any weights load.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from torch import Tensor

from kvoffload.calibration.budgets import measure_layers
from kvoffload.calibration.data import data_hash, read_sequences
from kvoffload.calibration.options import CalibrationOptions, parse_options
from kvoffload.calibration.recipes import RECIPES, check_sequences
from kvoffload.calibration.run import Job, Progress, State, calibrate
from kvoffload.completion.base import CompletionConfigBase
from kvoffload.completion.calibrated import Calibration
from kvoffload.completion.phi import PhiCompletionConfig
from kvoffload.errors import UsageError
from kvoffload.layer_budgets import KIND
from kvoffload.models.catalog import (
    ACCEPTED,
    LoadedModel,
    load_config,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve,
)
from kvoffload.models.fingerprint import weights_hash
from kvoffload.models.progress import LoadProgress
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.page_size import settle_page_size
from kvoffload.runtime.terminal import ProgressView, write_table
from kvoffload.settings import Settings

_OF_COMPLETIONS = ("queries", "budgets", "features", "family", "key_maps", "steps", "rate", "seed", "host_max")


def run_calibrate(
    settings: Settings, given: dict[str, Any], data: Sequence[Path], file: Path, out: TextIO, console: Console
) -> int:
    """Calibrate into ``file``; ``given`` are the command line's values, the options among them. The held-out figures of
    every layer go to ``out``, as a table or as one JSON object."""
    view = ProgressView(console, quiet=settings.quiet)
    by_layer = bool(given.get("by_layer"))
    _refuse_unused(given, _OF_COMPLETIONS if by_layer else ("budget",), by_layer=by_layer)
    completion = settings.completion[0] if by_layer else _completion(settings)
    options = parse_options(completion.model_dump(), given)
    if not by_layer:
        check_sequences(completion.kind, options)
    if not settings.model:
        raise UsageError(f"model: give one with --model; {ACCEPTED}")
    source = resolve(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    device, model_config = pick_device(settings.device), load_config(source)
    dtype = pick_dtype(settings.dtype, model_config, device)
    settings = settle_page_size(settings, model_config, dtype)
    check = options.check_by_layer if by_layer else options.check
    check(settings.runtime(), int(model_config.get_text_config(decoder=True).max_position_embeddings))
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UsageError(f"out: {str(file.parent)!r} is no folder that can be written to")
    with view.showing():
        tokenizer = load_tokenizer(source, view.load)
        sequences = read_sequences(data, tokenizer, n_tokens=options.context, n_sequences=options.sequences)
        identity = _identity(settings, options, completion) | {"model_dtype": str(dtype).removeprefix("torch.")}
        kind = completion.kind
        if by_layer:
            identity, kind = identity | {"budget": str(settings.effective_budget), "kind": kind}, KIND
        header = Calibration(
            completion=kind, model=source.name, weights=weights_hash(source), data=data_hash(sequences),
            options=identity, layers={},
        )  # fmt: skip
        state = State(file, header)
        loaded = load_model(source, dtype=dtype, device=device, tokenizer=tokenizer, on_progress=view.load)
        runtime = Runtime(loaded, settings.runtime())

        def show(progress: Progress) -> None:
            _show(view, progress)

        if by_layer:
            done = measure_layers(loaded.model, sequences, runtime.config, state, show)
        else:
            done = calibrate(_job(loaded, sequences, settings, completion, options), state, show)
    _report(settings, file, done, out)
    return 0


def _refuse_unused(given: dict[str, Any], names: Sequence[str], *, by_layer: bool) -> None:
    """Raises UsageError for flags that this kind of calibration would not look at."""
    if unused := [name for name in names if given.get(name) is not None]:
        told = "--by-layer measures under --budget and learns nothing" if by_layer else "only --by-layer looks at it"
        raise UsageError(f"{', '.join(unused)}: {told}; leave it out")


def _job(
    loaded: LoadedModel,
    sequences: Sequence[Tensor],
    settings: Settings,
    completion: Any,
    options: CalibrationOptions,
) -> Job:
    return Job(loaded.model, sequences, settings.runtime(), completion, options, RECIPES[completion.kind])


def _completion(settings: Settings) -> Any:
    """The one completion that is to be calibrated; phi where none is given."""
    if "completion" not in settings.model_fields_set:
        return PhiCompletionConfig.model_validate({"kind": "phi"})
    kinds = [config.kind for config in settings.completion]
    if len(kinds) != 1 or kinds[0] not in RECIPES:
        raise UsageError(f"completion: {'+'.join(kinds)!r} cannot be calibrated; accepted: {', '.join(RECIPES)}")
    if settings.completion[0].calibration is not None:
        raise UsageError("completion: a calibration starts from nothing, leave file= out")
    return settings.completion[0]


def _identity(
    settings: Settings, options: CalibrationOptions, completion: CompletionConfigBase
) -> dict[str, int | float | str]:
    """Everything besides model, data and completion that decides what is learned."""
    runtime = settings.runtime()
    selector = runtime.selector.model_dump_json()
    anchors = {"sinks": runtime.sinks, "recent": runtime.recent, "page_size": runtime.page_size, "pool": runtime.pool}
    own = completion.model_dump(mode="json", exclude={"kind", "file", "features", "seed"})
    return {**own, **options.identity(), **anchors, "selector": selector}


def _show(view: ProgressView, progress: Progress) -> None:
    view.load(LoadProgress(progress.step, progress.done, progress.total))
    if progress.said:
        view.say(progress.said)


def _report(settings: Settings, file: Path, done: Calibration, out: TextIO) -> None:
    if settings.output == "json":
        out.write(json.dumps({"file": str(file), **done.model_dump(mode="json")}) + "\n")
        return
    names = [name for name in next(iter(done.layers.values())) if "loss" not in name]
    rows = [(str(layer), *(f"{figures[name]:.4f}" for name in names)) for layer, figures in done.layers.items()]
    mean = [sum(figures[name] for figures in done.layers.values()) / len(done.layers) for name in names]
    told = "KL to dense at shares of the budget" if done.completion == KIND else "held-out errors"
    title = f"{file}: {done.completion} for {done.model}, {told} by layer"
    header = ("layer", *(name.replace("_", " ") for name in names))
    write_table(out, title, header, [*rows, ("mean", *(f"{value:.4f}" for value in mean))])
