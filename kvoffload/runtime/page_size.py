"""``--page-size auto``: pages as large as the disk likes to be asked for."""

import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from kvoffload_storage.disk import (
    MAX_FILE_BYTES,
    WRITE_BYTES,
    free_bytes,
    keep_read_unit,
    kept_read_unit,
    measure_disk,
)
from kvoffload_storage.errors import StorageError
from kvoffload_storage.manifests import read_manifest
from kvoffload_storage.page_file import unusable

from kvoffload.config import RuntimeConfig
from kvoffload.runtime.plan import KVFootprint
from kvoffload.runtime.session_file import describe
from kvoffload.units import AUTO_PAGE, format_size

C = TypeVar("C", bound=RuntimeConfig)
PAGE_SIZES = (16, 32, 64)


def page_size_for(read_unit: int, token_bytes: int) -> int:
    """The smallest page whose slice, K and V of its tokens, is at least the disk's unit; 64 tokens where none is."""
    return next((size for size in PAGE_SIZES if size * token_bytes >= read_unit), PAGE_SIZES[-1])


def settle_page_size(config: C, model_config: Any, dtype: torch.dtype) -> C:
    """The same with a number for "auto": what the session that is gone on with has; else, on files, what suits the
    disk; else 16. A disk is measured once for each ``nvme_dir``, so that runs over the same files agree."""
    if config.page_size != AUTO_PAGE:
        return config
    size = _of_session(config)
    if size is None:
        size = PAGE_SIZES[0]
        if config.offload == "nvme":
            unit = read_unit(config)
            size = size if unit is None else page_size_for(unit, KVFootprint.of(model_config, dtype).token_bytes)
    return config.model_copy(update={"page_size": size})


def read_unit(config: RuntimeConfig) -> int | None:
    """Of the disk that pages go to, measured for a second if it is not kept there yet; None where there is no room to
    measure in. Nothing is kept in the system's folder for temporary files."""
    folder = config.nvme_dir or Path(tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)  # page files would make it too
    except OSError as error:
        raise unusable(error, folder, what="cannot be made a folder for page files") from error
    unit = None if config.nvme_dir is None else kept_read_unit(folder)
    if unit is not None:
        return unit
    most_bytes = free_bytes(folder) - config.nvme_floor
    most_bytes = min(most_bytes, MAX_FILE_BYTES, config.nvme_max or MAX_FILE_BYTES)
    if most_bytes < WRITE_BYTES:
        return None
    unit = measure_disk(folder, most_bytes=most_bytes).read_unit
    return unit if config.nvme_dir is None else keep_read_unit(folder, unit)


def known_read_unit(config: RuntimeConfig) -> int | None:
    """The unit of the disk that pages go to, where it was measured."""
    return None if config.offload != "nvme" or config.nvme_dir is None else kept_read_unit(config.nvme_dir)


def page_size_hint(config: RuntimeConfig, model_config: Any, dtype: torch.dtype) -> str:
    """What a user should be told where the disk is known to like larger pages; empty when there is nothing."""
    unit = known_read_unit(config)
    if unit is None or _of_session(config) is not None:
        return ""
    size = page_size_for(unit, KVFootprint.of(model_config, dtype).token_bytes)
    if size <= config.page_size:
        return ""
    return (
        f"this disk is best read in pieces of {format_size(unit)}: --page-size {size} reads faster than "
        f"{config.page_size}"
    )


def _of_session(config: RuntimeConfig) -> int | None:
    path: Path | None = getattr(config, "session", None)  # settings of a command have one
    if path is None or not path.exists():
        return None
    try:
        return describe(read_manifest(path).session, path).fingerprint.page_size
    except StorageError:  # told, and raised, by who opens it
        return None
