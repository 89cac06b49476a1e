"""Calibration files: what was learned about the heads of one model, as safetensors.

The tensors of the model's layer I are named ``layers.I.*``. The only metadata key, ``kvoffload``, is a JSON object (the
fields of ``Calibration``). Equal calibrations are equal files: nothing in them tells when or where they were made.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvoffload.errors import KvoffloadError, UsageError

_KEY = "kvoffload"


class Calibration(BaseModel):
    """The header of a calibration file.

    ``weights`` is the hash of the model's weight files, ``data`` that of the calibration's tokens, ``options`` are
    those of the calibration, ``layers`` the held-out figures of every layer in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    completion: str
    model: str
    weights: str
    data: str
    options: dict[str, int | float | str]
    layers: dict[int, dict[str, float]]

    def same_run(self, other: "Calibration") -> bool:
        """Whether both come from the same model, data and options, however many layers are done."""
        return self.model_copy(update={"layers": {}}) == other.model_copy(update={"layers": {}})


@dataclass(frozen=True)
class CalibrationFile:
    """A calibration that was found in a file."""

    path: Path
    header: Calibration


def read_calibration(file: Path, completion: str) -> CalibrationFile:
    """A calibration of this completion, by its header; raises ValueError for anything else."""
    if not file.exists():
        raise ValueError(f"file {str(file)!r} is not there")
    try:
        with safe_open(file, framework="pt") as tensors:
            header = Calibration.model_validate_json((tensors.metadata() or {}).get(_KEY, ""))
    except (OSError, SafetensorError, ValidationError) as error:
        raise ValueError(f"file must be made by kvoffload calibrate, and {str(file)!r} is not") from error
    if header.completion != completion:
        raise ValueError(f"file must be a calibration of {completion}, and {str(file)!r} is one of {header.completion}")
    return CalibrationFile(file, header)


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every fp32 tensor in a safetensors file; tensors of another dtype are left out."""
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
        return {name: tuple(s.get_shape()) for name, s in slices.items() if s.get_dtype() == "F32"}


def read_tensors(file: Path, names: Mapping[str, tuple[int | None, ...]], device: torch.device) -> list[Tensor]:
    """Tensors by name, each with the shape that is expected of it (None where any size will do). Raises UsageError if
    one is missing, of another shape, or not finite."""
    shapes, read = tensor_shapes(file), []
    with safe_open(file, framework="pt") as tensors:
        for name, expected in names.items():
            shape = shapes.get(name)
            if (
                shape is None
                or len(shape) != len(expected)
                or any(e not in (None, n) for n, e in zip(shape, expected, strict=True))
            ):
                told = "no such fp32 tensor" if shape is None else f"shape {list(shape)}"
                raise UsageError(f"{str(file)!r}: {name}: {told}; this model's layer needs {_told(expected)}")
            tensor = tensors.get_tensor(name)
            if not bool(tensor.isfinite().all()):
                raise UsageError(f"{str(file)!r}: {name} has values that are not finite numbers")
            read.append(tensor.to(device))
    return read


def read_all(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, in host memory."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict


def write_calibration(file: Path, header: Calibration, tensors: Mapping[str, Tensor]) -> None:
    """Write the file by one rename of a finished temporary one: it is whole, or what it was before. Raises
    KvoffloadError if it cannot be written."""
    text = header.model_dump_json()  # in the order of the fields and of what they hold: no set, no time
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, temporary, metadata={_KEY: text})
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise KvoffloadError(f"{str(file)!r} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _told(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
