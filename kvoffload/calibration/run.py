"""A whole calibration: capture, learn layer by layer, keep what is done, so that a killed run goes on from there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvoffload.calibration.capture import LayerCapture, capture
from kvoffload.calibration.examples import make_examples
from kvoffload.calibration.options import CalibrationOptions
from kvoffload.calibration.recipes import LayerExamples, LayerResult, Recipe
from kvoffload.completion.base import CompletionConfigBase
from kvoffload.completion.calibrated import Calibration, read_all, read_calibration, write_calibration
from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.models.watch import offloaded_layers


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` in a step; ``said`` is a line for those who see no bars, or empty."""

    step: str
    done: int
    total: int
    said: str = ""


_PART = "part."
OnProgress = Callable[[Progress], None]


class State:
    """What is done, in a file beside the one that is to be: ``NAME.partial``, rewritten whole by one rename after each
    layer and part. It becomes the file itself, without ``parts`` (by name), when every layer is in."""

    def __init__(self, out: Path, header: Calibration) -> None:
        self._out, self._partial = out, out.with_name(out.name + ".partial")
        self.header, self._tensors, self.parts = header, dict[str, Tensor](), dict[str, Tensor]()
        if out.exists():
            raise UsageError(f"out: {str(out)!r} is there already: remove it or give another name")
        if self._partial.exists():
            self.header, tensors = self._resumed(header)
            self.parts = {name.removeprefix(_PART): t for name, t in tensors.items() if name.startswith(_PART)}
            self._tensors = {name: t for name, t in tensors.items() if not name.startswith(_PART)}

    def add(self, layer: int, result: LayerResult) -> None:
        """Keep a finished layer."""
        layers = dict(sorted({**self.header.layers, layer: result.figures}.items()))
        self.header = self.header.model_copy(update={"layers": layers})
        self._tensors |= result.tensors
        self._write()

    def keep(self, name: str, part: Tensor) -> None:
        """Keep a part of what layers will be made from."""
        self.parts[name] = part
        self._write()

    def finish(self) -> None:
        """Every layer is in."""
        if self.parts:
            self.parts.clear()
            self._write()
        self._partial.replace(self._out)

    def _write(self) -> None:
        parts = {_PART + name: part for name, part in self.parts.items()}
        write_calibration(self._partial, self.header, self._tensors | parts)

    def _resumed(self, header: Calibration) -> tuple[Calibration, dict[str, Tensor]]:
        try:
            found = read_calibration(self._partial, header.completion)
        except ValueError as error:
            raise UsageError(f"{str(self._partial)!r} cannot be gone on with ({error}): remove it") from None
        if not found.header.same_run(header):
            raise UsageError(
                f"{str(self._partial)!r} belongs to a calibration of another model, other data or other options: "
                "remove it, or give another --out"
            )
        return found.header, read_all(self._partial)


@dataclass(frozen=True)
class Job:
    """What is to be learned of a loaded model."""

    model: Any
    sequences: Sequence[Tensor]
    config: RuntimeConfig
    completion: CompletionConfigBase
    options: CalibrationOptions
    recipe: Recipe


def calibrate(job: Job, state: State, on_progress: OnProgress) -> Calibration:
    """Learn every layer that the state lacks and finish it; gives the header of the file."""
    layers = offloaded_layers(job.model.config)
    missing = [layer for layer in layers if layer not in state.header.layers]
    for group in _groups(job, missing, on_progress):
        for layer, captures in group.items():
            result = job.recipe(_examples(job, layer, captures), job.options, job.completion)
            state.add(layer, result)
            captures.clear()
            said = ", ".join(f"{name} {value:.3f}" for name, value in result.figures.items() if "loss" not in name)
            on_progress(Progress("learning layers", len(state.header.layers), len(layers), f"layer {layer}: {said}"))
    state.finish()
    return state.header


def _groups(job: Job, layers: Sequence[int], on_progress: OnProgress) -> Iterator[dict[int, list[LayerCapture]]]:
    """Captures of as many layers at a time as ``host_max`` bytes of host memory hold, at least one."""
    if not layers:
        return
    options, config = job.options, job.config
    probe = capture(job.model, job.sequences[:1], layers[:1], config, n_queries=options.queries)
    layer_bytes = sum(found.n_bytes for found in probe[layers[0]]) * len(job.sequences)
    n_layers = min(max(options.host_max // layer_bytes, 1), len(layers))
    for i in range(0, len(layers), n_layers):
        group, total = layers[i : i + n_layers], len(job.sequences)
        said = f"capturing layers {group[0]} to {group[-1]}: {layer_bytes * len(group) / 2**20:,.0f} MiB of host memory"
        on_progress(Progress("capturing", 0, total, said))

        def heard(done: int, total: int = total) -> None:
            on_progress(Progress("capturing", done, total))

        yield capture(job.model, job.sequences, group, config, n_queries=options.queries, on_sequence=heard)


def _examples(job: Job, layer: int, captures: Sequence[LayerCapture]) -> LayerExamples:
    device: torch.device = job.model.device
    made = [list(make_examples(found, job.config, job.options.budgets, device)) for found in captures]
    split = len(made) - job.options.n_held_out
    return LayerExamples(layer, captures[0].geometry, device, made[:split], made[split:])
