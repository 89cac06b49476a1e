"""Gluon, triton's language of explicit layouts; in the interpreter, which has none, the same functions of triton, to
which layouts are None and change nothing."""

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kvoffload_kernels.tiles import INTERPRETED


def linear(registers: list[list[int]], lanes: list[list[int]], shape: list[int]) -> Any:
    """The layout over one warp in which the bits of a register's and of a lane's number stand for these steps."""
    return language.DistributedLinearLayout(registers, lanes, [], [], shape)


def powers(n: int) -> list[int]:
    """The powers of two below n, itself one."""
    return [1 << i for i in range(n.bit_length() - 1)]


MMA: Any = language.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
"""Of what one warp's tensor cores add up: register 0 and lanes 0, 1 count columns, lanes 2 to 4 and register 1 rows."""


def _no_layout(*_: object) -> None:
    return None


_FUNCTIONS = (
    "where", "join", "split", "sum", "max", "minimum", "permute", "reshape", "expand_dims", "load", "store", "exp2",
    "log2", "fma", "program_id",
)  # fmt: skip
_TYPES = ("int16", "uint16", "int32", "int64", "float32", "bfloat16")


def _without_layouts() -> Any:
    return SimpleNamespace(
        **{name: getattr(tl, name) for name in _TYPES},
        **{name: _late(name) for name in _FUNCTIONS},
        arange=lambda start, end, layout: tl.arange(start, end),
        zeros=lambda shape, dtype, layout: tl.zeros(shape, dtype),
        convert_layout=lambda x, layout: x,
        SliceLayout=_no_layout,
        DotOperandLayout=_no_layout,
    )


def _late(name: str) -> Any:
    return lambda *args, **options: getattr(tl, name)(*args, **options)  # the interpreter patches triton.language


def _product(a: Any, b: Any, c: Any, input_precision: str | None = None) -> Any:
    return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")


jit: Any = triton.jit if INTERPRETED else gluon.jit
gl: Any = _without_layouts() if INTERPRETED else language
multiply: Any = _product if INTERPRETED else mma_v2
