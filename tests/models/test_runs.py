"""Several tokens a forward are single steps in every family, sliding windows, soft caps and sinks included."""

import pytest
import torch
from families import FAMILIES, family_model
from torch.testing import assert_close

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.teacher import prefill, teacher_forced
from kvoffload.models.cache import OffloadCache
from kvoffload.models.self_test import switch_attention


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_equal_single_steps(family):
    model = family_model(family)
    switch_attention(model)
    ids = torch.randint(2, 90, (2, 62), generator=torch.Generator().manual_seed(1))
    config = RuntimeConfig(budget="30%", sinks=4, recent=8, page_size=4)
    logits, n_forwards = [], []
    for longest in (64, 1):
        with OffloadCache(model.config, config) as cache:
            prefill(model, cache, ids[:, :45])
            blocks = list(teacher_forced(model, cache, ids[:, 45:], longest=longest))
        logits.append(torch.cat(blocks, dim=1))
        n_forwards.append(len(blocks))
    assert n_forwards[0] < n_forwards[1] == 17
    assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
