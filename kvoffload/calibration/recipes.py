"""What is learned of a layer, by the kind of completion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from kvoffload.calibration.distill import MapOptions, completion_of, distil, start_weights
from kvoffload.calibration.examples import Example, Losses, measure
from kvoffload.calibration.offsets import fit_offsets
from kvoffload.calibration.options import CalibrationOptions
from kvoffload.completion.base import CompletionConfigBase
from kvoffload.completion.none import NoCompletionConfig
from kvoffload.completion.offset import OffsetCompletion, offset_name
from kvoffload.completion.phi import PhiCompletionConfig
from kvoffload.errors import UsageError
from kvoffload.geometry import Geometry

_OFFSET_SEQUENCES = 3


@dataclass(frozen=True)
class LayerExamples:
    """One layer's examples on the device by sequence, and what belongs to them; ``layer`` counts the model's layers."""

    layer: int
    geometry: Geometry
    device: torch.device
    train: Sequence[Sequence[Example]]
    held_out: Sequence[Sequence[Example]]


@dataclass(frozen=True)
class LayerResult:
    """What a file keeps of a layer: its tensors by name and the held-out figures."""

    tensors: dict[str, Tensor]
    figures: dict[str, float]


Recipe = Callable[[LayerExamples, CalibrationOptions, CompletionConfigBase], LayerResult]


def learn_map(found: LayerExamples, options: CalibrationOptions, config: CompletionConfigBase) -> LayerResult:
    """A learned feature map; random features of the same number are measured beside it."""
    geometry, device = found.geometry, found.device
    n_maps = 1 if options.key_maps == "shared" else geometry.group_size
    seed = options.seed + found.layer
    how = MapOptions(options.family, options.features, n_maps, options.steps, options.rate, seed)
    train, held_out = _all(found.train), _all(found.held_out)
    start = start_weights(train, geometry, how)
    learned = distil(start, train, geometry, how)
    random = PhiCompletionConfig(features=options.features).build(geometry, found.layer, device)
    measured = {
        "random_": measure(random, held_out),
        "start_": measure(completion_of(start, how, geometry, device), held_out),
        "": measure(completion_of(learned, how, geometry, device), held_out),
    }
    return LayerResult(learned.tensors(found.layer), _none(found) | _figures(measured))


def learn_offsets(found: LayerExamples, options: CalibrationOptions, config: CompletionConfigBase) -> LayerResult:
    """Offsets for a completion that needs no training, chosen on the last training sequences, as many as are held out;
    ``moved`` is the share of query heads that got one."""
    completion = config.build(found.geometry, found.layer, found.device)
    split, held_out = len(found.train) - len(found.held_out), _all(found.held_out)
    offset = fit_offsets(completion, _all(found.train[:split]), _all(found.train[split:]))
    measured = {
        "start_": measure(completion, held_out),
        "": measure(OffsetCompletion(completion, offset), held_out),
    }
    figures = _none(found) | _figures(measured) | {"moved": float((offset != 0).float().mean())}
    return LayerResult({offset_name(found.layer): offset}, figures)


RECIPES: dict[str, Recipe] = {"phi": learn_map, "anchored": learn_offsets, "pages": learn_offsets}


def check_sequences(kind: str, options: CalibrationOptions) -> None:
    """Raises UsageError where there are too few sequences for what is learned of a completion."""
    if RECIPES[kind] is learn_offsets and options.sequences < _OFFSET_SEQUENCES:
        raise UsageError(
            f"sequences: {options.sequences} are too few: offsets are fitted, chosen and reported on different ones; "
            f"give at least {_OFFSET_SEQUENCES}"
        )


def _all(sequences: Sequence[Sequence[Example]]) -> list[Example]:
    return list(chain.from_iterable(sequences))


def _none(found: LayerExamples) -> dict[str, float]:
    """The error of the output without any completion."""
    completion = NoCompletionConfig().build(found.geometry, found.layer, found.device)
    return {"none_output": measure(completion, _all(found.held_out)).output}


def _figures(measured: dict[str, Losses]) -> dict[str, float]:
    return {prefix + name: value for prefix, losses in measured.items() for name, value in vars(losses).items()}
