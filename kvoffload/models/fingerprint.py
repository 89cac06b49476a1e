"""What a model is, by its content: a hash of its weight files, which calibration files are bound to."""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from kvoffload.errors import UsageError
from kvoffload.models.catalog import ModelSource, localize, resolve
from kvoffload.models.progress import quiet_transformers
from kvoffload.models.shapes import SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from kvoffload.completion.calibrated import CalibrationFile

_CHUNK = 1 << 23
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors")  # the first that is there


def weights_hash(source: ModelSource) -> str:
    """xxh3 over the names and bytes of the weight files and the config (of a built-in shape, whose weights follow from
    it, the config alone). A hub model's weights are downloaded if they are not there. Raises UsageError if there are no
    weight files."""
    if source.kind == "shape":
        return _text_hash(json.dumps(SHAPES[source.name]))
    source = localize(source)
    if source.kind == "gguf" and source.path is not None:
        return _hash_files((source.path,))
    folder = source.path or _snapshot(source)
    files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), None)
    if files is None:
        raise UsageError(
            f"model {source.name!r} has no weight files in {str(folder)!r} that a calibration can be bound to"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    return _text_hash(json.dumps(config, sort_keys=True) + _hash_files(tuple(files)))


def source_of(model_config: "PreTrainedConfig") -> ModelSource:
    """Where a loaded model came from, as its config remembers; a model that was changed since counts as what it was.
    Raises UsageError where that is not known."""
    name = str(model_config.name_or_path)
    try:
        return resolve(name, revision=getattr(model_config, "_commit_hash", None))
    except UsageError:
        raise UsageError(
            f"this {model_config.model_type} model's weight files are not known (its config.name_or_path is {name!r}), "
            "so that no calibration file can be checked against it"
        ) from None


def check_calibrations(calibrations: "Iterable[CalibrationFile]", source: ModelSource) -> None:
    """Raises UsageError if a file was calibrated for other weights than these; reads weight files only if there is one
    at all."""
    for found in calibrations:
        if found.header.weights != (given := weights_hash(source)):
            raise UsageError(
                f"{str(found.path)!r} was calibrated for {found.header.model!r} (weights {found.header.weights}) and "
                f"cannot be used with {source.name!r} (weights {given}): make one with kvoffload calibrate"
            )


def check_loaded(calibrations: "Sequence[CalibrationFile]", model_config: "PreTrainedConfig") -> None:
    """``check_calibrations`` for a model that is loaded already."""
    if calibrations:
        check_calibrations(calibrations, source_of(model_config))


def _snapshot(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with quiet_transformers():
            patterns = ["config.json", *_WEIGHTS[:1]]
            return Path(snapshot_download(source.name, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"the weight files of {source.name!r} cannot be had: {error}") from error


def _hash_files(files: tuple[Path, ...]) -> str:
    return _text_hash("".join(f"{file.name} {_file_hash(file, *_state(file))} " for file in files))


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


@lru_cache(maxsize=256)
def _file_hash(file: Path, n_bytes: int, modified_ns: int) -> str:
    """Size and time are there to be asked again when the file changes."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _text_hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
