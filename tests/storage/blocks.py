"""Batches of reads from the file of blocks."""

import numpy as np
import torch
from kvoffload_storage.engines import ReadBatch
from kvoffload_storage.plan import lone_reads

BLOCK = 4096


def batch(out: np.ndarray, blocks: list[int], *, in_place: bool) -> ReadBatch:
    """Block ``blocks[i]`` into row i of uint8 [n, BLOCK]."""
    plan = lone_reads(np.array(blocks, np.int64) * BLOCK, BLOCK)
    return ReadBatch(plan, torch.from_numpy(out.reshape(-1)), np.arange(len(blocks)) * BLOCK, BLOCK, in_place)
