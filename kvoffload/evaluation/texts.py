"""Long texts as disjoint pieces of a fixed number of tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvoffload.errors import UsageError


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens of a file."""

    name: str
    token_ids: tuple[int, ...]


def text_files(given: Iterable[Path]) -> tuple[Path, ...]:
    """The files meant by paths, folders (all files right in them) and patterns such as ``books/*.txt``, each once.
    Raises UsageError for what names no file and for files that are empty or no text."""
    found = [file for path in given for file in _files(path)]
    if not found:
        raise UsageError("text: give a text file, a folder or a pattern with --text")
    for file in dict.fromkeys(found):
        if not read_text(file).strip():
            raise UsageError(f"text file {str(file)!r} is empty")
    return tuple(dict.fromkeys(found))


def read_text(file: Path) -> str:
    """A UTF-8 file as a whole; raises UsageError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"text file {str(file)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"text file {str(file)!r} is not UTF-8 text: {error}") from None


def cut_pieces(tokenizer: Any, files: Sequence[Path], *, n_tokens: int, n_pieces: int) -> list[Piece]:
    """Disjoint pieces, taken from the files in turn, each from where the last one of its file ended. Raises UsageError
    with the tokens that are needed if the files are too short."""
    waiting = [(file, _token_ids(tokenizer, file)) for file in files]
    rooms = [len(ids) // n_tokens for _, ids in waiting]
    order = sorted((number, place) for place, room in enumerate(rooms) for number in range(room))
    if len(order) < n_pieces:
        raise UsageError(
            f"the text is too short: {n_pieces} pieces of {n_tokens:,} tokens are needed ({n_pieces * n_tokens:,} in "
            f"all), {len(files)} files with {sum(len(ids) for _, ids in waiting):,} tokens have {len(order)}"
        )
    pieces = []
    for number, place in order[:n_pieces]:
        file, ids = waiting[place]
        pieces.append(Piece(f"{file.name}@{number * n_tokens}", ids[number * n_tokens : (number + 1) * n_tokens]))
    return pieces


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if path.is_file():
        return [path]
    base = Path(path.anchor) if path.is_absolute() else Path()
    pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
    found = sorted(file for file in base.glob(pattern) if file.is_file())
    if not found:
        raise UsageError(f"text {str(path)!r} is no file, no folder and no pattern that matches a file")
    return found


@lru_cache(maxsize=64)
def _token_ids(tokenizer: Any, file: Path) -> tuple[int, ...]:
    return tuple(tokenizer(read_text(file), verbose=False).input_ids)
