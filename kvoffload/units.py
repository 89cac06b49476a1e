"""Numbers as people spell them: sizes in bytes, context lengths, and the read budget with its three spellings.

``K M G T`` and ``KiB MiB GiB TiB`` are powers of 1024, ``KB MB GB TB`` powers of 1000. Context lengths know ``k`` and
``m`` only, as powers of 1024 (``128k`` is 131072, as in the names of models).
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

AUTO_PAGE = 0  # a page size that is not settled yet

_PREFIXES = "kmgt"
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SIZE = re.compile(_NUMBER + r"\s*([kmgt]?)(i?b?)", re.IGNORECASE)
_COUNT = re.compile(_NUMBER + r"\s*([km]?)", re.IGNORECASE)
_PERCENT = re.compile(_NUMBER + r"\s*%")
_SIZE_EXAMPLES = "a size such as 512MiB, 1.5GB or 200G (G is 2^30, GB is 10^9)"
_BUDGET_EXAMPLES = "a share of the context (5%), tokens (2048) or bytes a step (16MiB)"


def parse_size(value: str | int) -> int:
    """Bytes of a size with a unit; a bare number is bytes. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or match[3].lower() == "i" or (match[3].lower() == "ib" and not match[2]):
        raise ValueError(f"{str(value)!r} is not {_SIZE_EXAMPLES}")
    base = 1000 if match[2] and match[3].lower() == "b" else 1024
    exponent = _PREFIXES.index(match[2].lower()) + 1 if match[2] else 0
    return round(float(match[1]) * math.pow(base, exponent))


def parse_count(value: str | int) -> int:
    """Tokens of a context length such as ``8192`` or ``128k``. Raises ValueError for anything else."""
    match = _COUNT.fullmatch(str(value).strip())
    count = 0.0 if match is None else float(match[1]) * 1024 ** ("km".index(match[2].lower()) + 1 if match[2] else 0)
    if count < 1 or count != int(count):
        raise ValueError(f"{str(value)!r} is not a number of tokens such as 8192 or 128k (k is 1024)")
    return int(count)


def format_size(n_bytes: float) -> str:
    """A size for people, in powers of 1024 with three or four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} TiB"


@dataclass(frozen=True)
class Budget:
    """Token-equivalents that a step may read per layer and kv head; ``str`` gives the spelling back."""

    amount: float
    unit: Literal["percent", "tokens", "bytes"]
    spelling: str = field(compare=False)

    @classmethod
    def parse(cls, value: "str | int | Budget") -> "Budget":
        """A budget of one of the three spellings; raises ValueError for anything else."""
        if isinstance(value, Budget):
            return value
        text = str(value).strip()
        if match := _PERCENT.fullmatch(text):
            return cls._percent(float(match[1]), text)
        if re.fullmatch(r"\d+", text):
            return cls(float(text), "tokens", text)
        if re.fullmatch(r".*[bB]", text):
            return cls(float(cls._bytes(text)), "bytes", text)
        raise ValueError(f"{text!r} is not a budget: give {_BUDGET_EXAMPLES}")

    @classmethod
    def _percent(cls, amount: float, text: str) -> "Budget":
        if amount > 100:
            raise ValueError(f"{text!r} is more than 100%: give {_BUDGET_EXAMPLES}")
        return cls(amount, "percent", text)

    @staticmethod
    def _bytes(text: str) -> int:
        try:
            return parse_size(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a budget: give {_BUDGET_EXAMPLES}") from None

    def __str__(self) -> str:
        return self.spelling

    def tokens(self, context: int, *, token_bytes: int, n_heads_total: int) -> float:
        """Token-equivalents per layer and kv head at this context; n_heads_total is layers x kv heads (x sequences)."""
        if self.unit == "percent":
            return context * self.amount / 100
        if self.unit == "tokens":
            return self.amount
        return self.amount / (token_bytes * n_heads_total)


def parse_page_size(value: Any) -> Any:
    """A page size as given; AUTO_PAGE for "auto"."""
    if value in (0, "0"):
        raise ValueError(f"{value} is not a power of two from 1 to 256, or auto")
    return AUTO_PAGE if value == "auto" else value
