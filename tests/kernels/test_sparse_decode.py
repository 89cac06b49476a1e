"""Attention over a flat list of slices equals a dense softmax over each row's own tokens."""

import pytest
import torch
from kvoffload_kernels.sparse_decode import reference
from torch.testing import assert_close

kernel = pytest.importorskip("kvoffload_kernels.sparse_decode.kernel", exc_type=ImportError)
step_kernel = pytest.importorskip("kvoffload_kernels.decode_step.kernel", exc_type=ImportError)

ROUNDED = {"atol": 1e-4, "rtol": 1e-4}  # the query and the weights as two bf16 halves each (kernels/README.md)
ROWS, GROUP, SIZE, KEY_DIM, VALUE_DIM = 4, 3, 5, 6, 7


@pytest.fixture(params=[reference, kernel], ids=["reference", "triton"])
def attend_slices(request):
    return request.param.attend_slices


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
def test_each_row_attends_to_its_own_slices(attend_slices, row_ids, dtype, softcap):
    inputs = slices(row_ids, dtype)
    given = attend_slices(*inputs, None, softcap)
    halved = dtype == torch.bfloat16 and attend_slices is kernel.attend_slices
    bound = ROUNDED if halved else {"atol": 1e-5, "rtol": 1e-5}
    assert_close(given, dense(*inputs, softcap=softcap), **bound)


def test_a_row_without_a_slice_is_empty(attend_slices):
    output, lse = attend_slices(*slices([0, 0, 3]), None, None)
    assert lse[1:3].isneginf().all()
    assert not output[1:3].any()
    assert lse[[0, 3]].isfinite().all()


def test_no_slice_at_all_leaves_every_row_empty(attend_slices):
    output, lse = attend_slices(*slices([]), None, None)
    assert lse.shape == (ROWS, GROUP)
    assert lse.isneginf().all()
    assert not output.any()


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_tokens_that_are_not_valid_do_not_count(attend_slices, softcap):
    inputs = slices([0, 1, 1, 2, 3, 3])
    valid = torch.rand(6, SIZE, generator=torch.Generator().manual_seed(1)) > 0.4
    valid[3] = False  # all that row 2 has
    output, lse = attend_slices(*inputs, valid, softcap)
    assert_close((output, lse), dense(*inputs, valid, softcap), atol=1e-5, rtol=1e-5)
    assert lse[2].isneginf().all()


def test_rows_with_very_different_logits_do_not_disturb_each_other(attend_slices):
    query, keys, values, row_ids = slices([0, 1, 2, 3])
    query[1] *= 300
    query[2] -= 1000
    given = attend_slices(query, keys, values, row_ids, None, None)
    output, _ = dense(query, keys, values, row_ids)
    assert_close(given[0], output, atol=1e-4, rtol=1e-4)
    expected = torch.stack([(query[r].double() @ keys[r].double().T).logsumexp(-1) for r in range(ROWS)]).float()
    assert_close(given[1], expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("n_slices", [1, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (7, 96), (16, 256)])
def test_slices_of_a_page_buffer_at_real_head_sizes(group, dim, dtype, n_slices):
    """Keys and values are views of one buffer, K before V, as pages are laid out."""
    generator = torch.Generator().manual_seed(3)
    query = 3 * torch.randn(2, group, dim, generator=generator) / dim**0.5
    pages = torch.randn(n_slices, 2, 16, dim, generator=generator).to(dtype)
    row_ids = torch.randint(2, (n_slices,), generator=generator)
    valid = torch.rand(n_slices, 16, generator=generator) > 0.2
    given = kernel.attend_slices(query, pages[:, 0], pages[:, 1], row_ids, valid, None)
    assert_close(given, reference.attend_slices(query, pages[:, 0], pages[:, 1], row_ids, valid, None), **ROUNDED)


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_may_lie_among_others(attend_slices, dtype, size):
    generator = torch.Generator().manual_seed(5)
    pages = torch.randn(40, 2, size, 32, generator=generator).to(dtype)
    row_ids, places = torch.randint(3, (21,), generator=generator), torch.randperm(40, generator=generator)[:21]
    query, valid = torch.randn(4, 2, 32, generator=generator), torch.rand(21, size, generator=generator) > 0.2
    pages[(torch.bincount(places, minlength=40) == 0)] = torch.nan  # what is not named must not be read
    given = attend_slices(query, pages[:, 0], pages[:, 1], row_ids, valid, None, places)
    expected = attend_slices(query, pages[places, 0], pages[places, 1], row_ids, valid, None)
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


def test_lists_name_each_rows_slices_in_order(monkeypatch):
    monkeypatch.setattr(kernel, "_CHUNK", 4)
    row_ids = torch.tensor([2, 0, 2, 2, 5, 0, 2, 4, 4])
    order, counts = kernel.slice_lists(row_ids, 6)
    for row in range(6):
        assert order[row, : counts[row]].tolist() == [i for i, r in enumerate(row_ids.tolist()) if r == row]


def test_one_program_for_many_tiles_of_slices_gives_what_many_give(monkeypatch):
    query, keys, values, row_ids = slices([i % ROWS for i in range(60)])
    monkeypatch.setattr(kernel, "_TILE", 16)
    monkeypatch.setattr(kernel, "_PROGRAMS", 1)
    given = kernel.attend_slices(3 * query, keys, values, row_ids, None, None)
    assert_close(given, dense(3 * query, keys, values, row_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("twin", [reference, kernel, step_kernel], ids=["reference", "triton", "one launch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_tokens", "seen_rows", "softcap"), [(96, 1, None), (40, ROWS, 1.5), (128, ROWS, None), (8, 1, None)]
)
def test_whole_rows_are_attended_to_where_they_are_seen(twin, n_tokens, seen_rows, softcap, dtype):
    generator = torch.Generator().manual_seed(n_tokens)
    query = torch.randn(ROWS, GROUP, KEY_DIM, generator=generator)
    keys, values = (torch.randn(ROWS, n_tokens, d, generator=generator).to(dtype) for d in (KEY_DIM, VALUE_DIM))
    seen = torch.rand(seen_rows, n_tokens, generator=generator) < 0.7
    seen[:, 0], seen[-1, 1:] = True, False
    assert kernel.supports_rows(query, keys, values)
    output, lse = twin.attend_rows(query, keys, values, seen, softcap)
    for row in range(ROWS):
        mine = seen[row % seen_rows]
        logits = query[row].double() @ keys[row, mine].double().T
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        assert_close(output[row].double(), logits.softmax(-1) @ values[row, mine].double(), **ROUNDED)
        assert_close(lse[row].double(), logits.logsumexp(-1), **ROUNDED)


def test_rows_that_cannot_be_cut_are_left_to_the_reference():
    query, tokens = torch.zeros(2, 3, 8), torch.zeros(2, 100, 8)
    assert not kernel.supports_rows(query, tokens, tokens)
    assert not kernel.supports_rows(query, tokens[:, :64], tokens[:, :64])
