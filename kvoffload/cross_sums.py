"""Sums of products over tokens, for what is fitted to a prompt."""

import torch
from torch import Tensor


def cross_sums(left: Tensor, right: Tensor) -> Tensor:
    """l^T r summed over tokens, fp32 [rows, L, R], of fp32 [rows, n, L] and [rows, n, R]. A GPU multiplies in bfloat16
    and adds in fp32: factors are off by up to 2^-8, independently, and so the sums by some 2^-8 / sqrt(n)."""
    if not left.is_cuda:
        return left.mT @ right
    return torch.bmm(left.bfloat16().mT, right.bfloat16(), out_dtype=torch.float32)
