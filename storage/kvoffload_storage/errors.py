"""The errors of the storage package; each names the value and what was expected.

StorageError
├── CapacityError    no room: disk, host memory, locked-memory limit, open files or a cap that the user set
├── IntegrityError   bytes came back that are not the bytes that were written
└── UnavailableError a directory, file or feature that was asked for cannot be used, or is of another format version
"""


class StorageError(Exception):
    """Anything that a store can fail with."""


class CapacityError(StorageError):
    """There is no room for the bytes: disk, host memory or a cap."""


class IntegrityError(StorageError):
    """The bytes on disk are not the bytes that were written. ``layer`` and ``page`` say of which page, where it is one
    page of a store."""

    def __init__(self, message: str, *, layer: int | None = None, page: int | None = None) -> None:
        super().__init__(message)
        self.layer, self.page = layer, page


class UnavailableError(StorageError):
    """A directory, file or I/O feature that was asked for cannot be used."""
