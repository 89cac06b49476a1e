"""Attention over a flat list of slices equals a dense softmax over each row's own tokens."""

import pytest
import torch
from kvoffload_kernels.sparse_decode.reference import attend_slices
from torch.testing import assert_close

ROWS, GROUP, SIZE, KEY_DIM, VALUE_DIM = 4, 3, 5, 6, 7


def slices(row_ids, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(ROWS, GROUP, KEY_DIM, generator=generator)
    keys, values = (torch.randn(len(row_ids), SIZE, d, generator=generator).to(dtype) for d in (KEY_DIM, VALUE_DIM))
    return query, keys, values, torch.tensor(row_ids, dtype=torch.int64)


def dense(query, keys, values, row_ids, valid=None, softcap=None):
    """Per row: gather its tokens, one softmax in fp64."""
    output, lse = torch.zeros(ROWS, GROUP, VALUE_DIM), torch.full((ROWS, GROUP), -torch.inf)
    for row in set(row_ids.tolist()):
        mine = row_ids == row
        counts = torch.ones(int(mine.sum()), SIZE, dtype=torch.bool) if valid is None else valid[mine]
        k, v = keys[mine][counts].double(), values[mine][counts].double()
        if len(k) == 0:
            continue
        logits = query[row].double() @ k.T
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        output[row], lse[row] = (logits.softmax(-1) @ v).float(), logits.exp().sum(-1).log().float()
    return output, lse


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_ids", [[0, 1, 2, 3], [3, 0, 3, 1, 3, 0, 2], [2]])
def test_each_row_attends_to_its_own_slices(row_ids, dtype, softcap):
    inputs = slices(row_ids, dtype)
    given = attend_slices(*inputs, None, softcap)
    assert_close(given, dense(*inputs, softcap=softcap), atol=1e-5, rtol=1e-5)


def test_a_row_without_a_slice_is_empty():
    output, lse = attend_slices(*slices([0, 0, 3]), None, None)
    assert lse[1:3].isneginf().all()
    assert not output[1:3].any()
    assert lse[[0, 3]].isfinite().all()


def test_no_slice_at_all_leaves_every_row_empty():
    output, lse = attend_slices(*slices([]), None, None)
    assert lse.shape == (ROWS, GROUP)
    assert lse.isneginf().all()
    assert not output.any()


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_tokens_that_are_not_valid_do_not_count(softcap):
    inputs = slices([0, 1, 1, 2, 3, 3])
    valid = torch.rand(6, SIZE, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[3] = False  # all that row 2 has
    output, lse = attend_slices(*inputs, valid, softcap)
    assert_close((output, lse), dense(*inputs, valid, softcap), atol=1e-5, rtol=1e-5)
    assert lse[2].isneginf().all()


def test_rows_with_very_different_logits_do_not_disturb_each_other():
    query, keys, values, row_ids = slices([0, 1, 2, 3])
    query[1] *= 300
    query[2] -= 1000
    given = attend_slices(query, keys, values, row_ids, None, None)
    output, _ = dense(query, keys, values, row_ids)
    assert_close(given[0], output, atol=1e-4, rtol=1e-4)
    expected = torch.stack([(query[r].double() @ keys[r].double().T).logsumexp(-1) for r in range(ROWS)]).float()
    assert_close(given[1], expected, atol=1e-3, rtol=1e-5)
