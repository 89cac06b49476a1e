"""The members of an exported session (FORMAT.md, "Export") as pure functions: one tar block before each file."""

import tarfile

from .errors import IntegrityError

BLOCK_BYTES = tarfile.BLOCKSIZE
ARCHIVE_END = bytes(2 * BLOCK_BYTES)


def encode_member(name: str, n_bytes: int) -> bytes:
    """The block before a file; GNU tar's form, which has room for sizes of 8 GiB and more."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = n_bytes, 0o600
    return member.tobuf(tarfile.GNU_FORMAT)


def decode_member(block: bytes, *, name: str) -> tuple[str, int] | None:
    """Name and bytes of the file behind a block, or None at the archive's end; IntegrityError, which begins with the
    archive's ``name``, for whatever is no plain file: also one with holes, or with a block of its own for its name."""
    if block == bytes(BLOCK_BYTES):
        return None
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise IntegrityError(f"{name}: not an exported session: {error}") from error
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0:
        raise IntegrityError(f"{name}: {member.name!r} is not a plain file (tar type {member.type!r})")
    return member.name, member.size


def padding_bytes(n_bytes: int) -> int:
    """Zero bytes behind a file, up to the next block."""
    return -n_bytes % BLOCK_BYTES
