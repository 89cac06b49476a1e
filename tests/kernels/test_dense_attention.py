"""Both twins of dense attention against attention written out in fp64, one query at a time."""

import math

import pytest
import torch
from kvoffload_kernels import dispatch
from kvoffload_kernels.dense_attention import fused, reference
from torch import Tensor
from torch.testing import assert_close

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # the fused twin rounds its output to bf16 once
TWINS = {"reference": reference.attend, "dispatch": dispatch.attend, "fused": fused.attend}


def heads(rows=2, group=3, n_queries=5, n_keys=7, key_dim=8, value_dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, group, n_queries, key_dim), (rows, n_keys, key_dim), (rows, n_keys, value_dim)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def one_by_one(query, keys, values, *, scale, causal=False, valid=None, softcap=None) -> tuple[Tensor, Tensor]:
    """Softmax attention in Python floats' precision; the keys a query sees are listed one after the other."""
    output = torch.zeros(*query.shape[:3], values.shape[-1], dtype=torch.float64)
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    for row, head, i in [
        (r, h, q) for r in range(query.shape[0]) for h in range(query.shape[1]) for q in range(query.shape[2])
    ]:
        seen = [j for j in range(keys.shape[1]) if (not causal or j <= i) and (valid is None or valid[row, j])]
        logits = [float(query[row, head, i].double() @ keys[row, j].double()) * scale for j in seen]
        logits = logits if softcap is None else [softcap * math.tanh(z / softcap) for z in logits]
        total = sum(math.exp(z) for z in logits)
        if total:
            lse[row, head, i] = math.log(total)
            output[row, head, i] = sum(
                math.exp(z) / total * values[row, j].double() for z, j in zip(logits, seen, strict=True)
            )
    return output.float(), lse.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "n_queries", "n_keys"), [(1, 1, 1), (3, 5, 7), (2, 1, 33), (4, 17, 3)])
@pytest.mark.parametrize("twin", TWINS)
def test_every_query_sees_every_key(twin, group, n_queries, n_keys, dtype):
    query, keys, values = heads(group=group, n_queries=n_queries, n_keys=n_keys, dtype=dtype)
    given = TWINS[twin](query, keys, values, scale=0.4)
    for a, b in zip(given, one_by_one(query, keys, values, scale=0.4), strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 5, 34])
@pytest.mark.parametrize("twin", TWINS)
def test_a_causal_query_sees_itself_and_what_came_before(twin, n_tokens, dtype):
    query, keys, values = heads(n_queries=n_tokens, n_keys=n_tokens, dtype=dtype)
    given = TWINS[twin](query, keys, values, scale=0.4, causal=True)
    for a, b in zip(given, one_by_one(query, keys, values, scale=0.4, causal=True), strict=True):
        assert_close(a, b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("twin", TWINS)
def test_views_with_other_strides_give_the_same_result(twin):
    """A model hands over [B, N, H, D] transposed, and keys cut out of wider tensors."""
    query, keys, values = heads(n_queries=6, n_keys=6)
    wide = torch.cat([keys, values], -1)
    views = query.transpose(1, 2).contiguous().transpose(1, 2), *wide.split([8, 8], -1)
    assert not any(view.is_contiguous() for view in views)
    given, expected = (TWINS[twin](*tensors, scale=0.4, causal=True) for tensors in (views, (query, keys, values)))
    assert_close(given, expected)


@pytest.mark.parametrize("twin", ["reference", "dispatch"])
@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"masked": True}, {"softcap": 2.0, "masked": True, "causal": True}]
)
def test_masks_and_soft_caps_are_applied_by_both(twin, options):
    options = dict(options)
    query, keys, values = heads(n_queries=9, n_keys=9)
    valid = None
    if options.pop("masked", False):
        valid = torch.arange(9) >= torch.tensor([[4], [0]])
    given = TWINS[twin](query, keys, values, scale=1.0, valid=valid, **options)
    expected = one_by_one(query, keys, values, scale=1.0, valid=valid, **options)
    for a, b in zip(given, expected, strict=True):
        assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("twin", ["reference", "dispatch"])
def test_a_query_that_sees_no_key_is_empty(twin):
    query, keys, values = heads(n_queries=4, n_keys=4)
    valid = torch.tensor([[False, False, True, True], [False] * 4])
    output, lse = TWINS[twin](query, keys, values, scale=1.0, causal=True, valid=valid)
    assert lse[0, :, :2].isneginf().all()
    assert lse[1].isneginf().all()
    assert not output[0, :, :2].any()
    assert not output[1].any()
    assert lse[0, :, 2:].isfinite().all()


@pytest.mark.parametrize("twin", ["reference", "dispatch"])
def test_no_keys_at_all_give_an_empty_partial(twin):
    query, keys, values = heads(n_keys=0)
    output, lse = TWINS[twin](query, keys, values, scale=1.0)
    assert output.shape == (2, 3, 5, 8)
    assert not output.any()
    assert lse.isneginf().all()


def test_values_of_another_size_than_keys_are_attended_to():
    query, keys, values = heads(value_dim=5)
    given = dispatch.attend(query, keys, values, scale=0.4)
    for a, b in zip(given, one_by_one(query, keys, values, scale=0.4), strict=True):
        assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("change", ["mask", "softcap", "sizes", "dtype", "no keys"])
def test_the_fused_twin_declines_what_it_cannot_do(change):
    query, keys, values = heads(value_dim=5 if change == "sizes" else 8, n_keys=0 if change == "no keys" else 7)
    keys = keys.bfloat16() if change == "dtype" else keys
    valid = torch.ones(2, 7, dtype=torch.bool) if change == "mask" else None
    assert not fused.supported(query, keys, values, valid, 3.0 if change == "softcap" else None)


def test_logits_too_large_for_exp_still_normalise():
    query, keys, values = heads()
    given = reference.attend(query * 1000, keys, values, scale=1.0)
    best = (query @ keys[:, None].transpose(-1, -2)).argmax(-1)
    assert_close(given[0], values[torch.arange(2)[:, None, None], best])
