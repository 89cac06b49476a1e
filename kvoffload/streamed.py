"""Tensors of a CUDA device that lie in pinned host memory: kernels read and write them across the link, as if they were
on the device (unified addressing, CUDA C++ Programming Guide, section "Mapped Memory"), and no copy is made."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from kvoffload_storage.aligned import aligned_empty
from torch import Tensor


class _Shown:
    """Host memory uint8 [n] under its own address, as a device's; whoever takes it keeps it alive."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        place = {"shape": tuple(memory.shape), "typestr": "|u1", "data": (memory.data_ptr(), False)}
        self.__cuda_array_interface__: dict[str, Any] = {**place, "strides": None, "version": 3}


def streamed_empty(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Uninitialised, with the dtype and the device of ``like``, in host memory that the device reads. On another device
    than a GPU memory of its own. Raises CapacityError where the memory cannot be pinned."""
    n_bytes = math.prod(sizes) * like.itemsize
    if not like.is_cuda or n_bytes == 0:
        return like.new_empty(sizes)
    shown = torch.as_tensor(_Shown(aligned_empty(n_bytes, pinned=True)), device=like.device)
    return shown.view(like.dtype).view(*sizes)
