"""From text files to sequences of tokens."""

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from kvoffload.errors import UsageError

_CHARACTERS = 16  # of a file that are read for each token wanted; no text has tokens as long on average


def read_sequences(files: Sequence[Path], tokenizer: Any, *, n_tokens: int, n_sequences: int) -> list[Tensor]:
    """``n_sequences`` of int64 [n_tokens], cut from the files in turns so that each has its part. Raises UsageError if
    they hold too few."""
    if not files:
        raise UsageError("data: give text with --data FILE, which may be repeated")
    wanted = n_tokens * n_sequences
    cuts = [_cut(tokenizer(_read(file)[: wanted * _CHARACTERS], verbose=False).input_ids, n_tokens) for file in files]
    sequences = [cut for cut in chain.from_iterable(zip_longest(*cuts)) if cut is not None]
    if len(sequences) < n_sequences:
        raise UsageError(
            f"data: the files hold {len(sequences)} sequences of {n_tokens} tokens and {n_sequences} are wanted: give "
            "more text, fewer --sequences or a shorter --context"
        )
    return sequences[:n_sequences]


def data_hash(sequences: Sequence[Tensor]) -> str:
    """xxh3 over all tokens."""
    return xxhash.xxh3_128_hexdigest(torch.stack(list(sequences)).numpy().tobytes())


def _cut(ids: list[int], n_tokens: int) -> list[Tensor]:
    return [torch.tensor(ids[i : i + n_tokens]) for i in range(0, len(ids) - n_tokens + 1, n_tokens)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"data file {str(file)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"data file {str(file)!r} is not UTF-8 text: {error}") from None
