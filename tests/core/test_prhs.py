"""PrHS as it is configured: windows by depth, dilation with the default share, and both beside each other."""

import math

import pytest
import torch
from heads import geometry
from layers import new_layers, take_in
from streams import filled, pairs_of, steps, stream, watch_selections
from torch.testing import assert_close

from kvoffload.values import query_rows

N_PROMPT, N_LAYERS, SINKS, PAGE = 300, 4, 4, 4
PLAIN = {"selector": "exact", "completion": "none", "pool": "none"}


def early_first(n, shape):
    """A stream of one query for ever, which likes a key the more the earlier it is."""
    query, keys, values = stream(shape, n, rho=1.0)
    direction = torch.nn.functional.normalize(query[:, 0, :1], dim=-1)
    keys = direction * torch.linspace(3.0, -3.0, n)[None, :, None]
    return (4 * direction)[:, None].expand_as(query).contiguous(), keys, values


def selections_by_depth(policy, n_new):
    """The pages that row 0 of each layer reads in each step, for a stream whose earliest pages are its best."""
    shape = geometry(group_size=1)
    given = early_first(N_PROMPT + n_new, shape)
    found = []
    for layer in new_layers(N_LAYERS, shape, budget="15%", **PLAIN, **({"policy": policy} if policy else {})):
        query, keys, values = given
        take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT])
        seen = watch_selections(layer)
        steps(layer, given, N_PROMPT, n_new)
        found.append([{page for row, page in pairs_of(s) if row == 0} for s in seen])
    return found


def window(place, n_tokens, *, start, keep, power):
    """The first page that the layer ``place`` (from 1) of all may read: all before it lie below
    floor((1 - phi^(alpha (l - l_s) / (N - l_s))) t)."""
    if place <= start:
        return 0
    first = math.floor((1 - keep ** (power * (place - start) / (N_LAYERS - start))) * n_tokens)
    return (first - SINKS) // PAGE


def test_deep_layers_read_from_their_window_on_and_the_first_ones_everything():
    n_new = 12
    expected = selections_by_depth(None, n_new)
    given = selections_by_depth("prhs:block=1,window_from=2,window_keep=0.36,window_power=1.5", n_new)
    for place, (mine, plain) in enumerate(zip(given, expected, strict=True), start=1):
        for i, (pages, others) in enumerate(zip(mine, plain, strict=True)):
            first = window(place, N_PROMPT + i + 1, start=2, keep=0.36, power=1.5)
            assert others == set(range(len(others)))
            assert pages == set(range(first, first + len(others)))
    assert given[0] == given[1] == expected[0]
    assert max(given[1][-1]) < min(given[2][-1]) < min(given[3][-1])  # 3 keeps .6^1.5 = .46, 4 .36^1.5 = .22


def test_what_a_window_leaves_out_is_not_attended():
    shape = geometry()
    query, keys, values = stream(shape, N_PROMPT + 1)
    policy = "prhs:block=1,window_from=1,window_keep=0.25"
    layers = new_layers(2, shape, budget="68", policy=policy, **PLAIN)  # 17 pages
    outputs = []
    for layer in layers:
        take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT])
        outputs.append(steps(layer, (query, keys, values), N_PROMPT, 1)[0])
    n, first = N_PROMPT + 1, SINKS + (int(0.75 * (N_PROMPT + 1)) - SINKS) // PAGE * PAGE
    kept = torch.cat([torch.arange(SINKS), torch.arange(first, n)])
    logits = torch.einsum("grd,gnd->grn", query[:, :, -1], keys[:, kept])
    expected = torch.cat([logits.softmax(-1) @ values[:, kept], logits.logsumexp(-1)[..., None]], -1)
    assert_close(outputs[1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0], expected, atol=1e-2)


def peaked(shape, n, place):
    """A stream of one query; page ``place`` is its best, and the two beside it are the worst of all."""
    query, keys, values = stream(shape, n, rho=1.0)
    direction = torch.nn.functional.normalize(query[:, 0, :1], dim=-1)
    for page, size in ((place - 1, -9.0), (place, 9.0), (place + 1, -9.0)):
        keys[:, SINKS + page * PAGE : SINKS + (page + 1) * PAGE] = size * direction
    return query, keys, values


@pytest.mark.parametrize(("policy", "n_dilated"), [("prhs:tau=-1", 1), ("prhs:tau=-1,reach=2", 1),
                                                   ("prhs:tau=-1,hits=0", 0)])  # fmt: skip
def test_steps_behind_the_anchor_read_the_neighbours_of_its_best_pages(policy, n_dilated):
    """By default of one hit in 24, page by page: the 37 slices a head of half of 301 tokens dilate one."""
    shape, place, n_slices = geometry(group_size=1), 30, 37
    given = peaked(shape, N_PROMPT + 3, place)
    layer = filled(shape, given, N_PROMPT, budget="50%", policy=policy, **PLAIN)
    seen = watch_selections(layer)
    steps(layer, given, N_PROMPT, 3)
    query, keys, _ = given
    pages = keys[:, SINKS : SINKS + layer.n_pages * PAGE].unflatten(1, (-1, PAGE))
    masses = torch.einsum("gd,gpsd->gps", query[:, 0, N_PROMPT], pages).logsumexp(-1)
    reach = 2 if "reach=2" in policy else 1
    for row in range(shape.rows):
        order = masses[row].argsort(descending=True).tolist()
        beside = [place + j for j in range(-reach, reach + 1) if j] if n_dilated else []
        first, *behind = [{page for r, page in pairs_of(s) if r == row} for s in seen]
        assert order[0] == place
        assert first == set(order[:n_slices])
        others = [page for page in order if page not in beside]
        assert behind == [{*beside, *others[: n_slices - len(beside)]}] * 2


def test_no_step_of_a_block_reads_below_its_window():
    """Neither what the anchor step chose before the window moved on, nor a neighbour of its first page."""
    n_new = 16
    policy = "prhs:block=16,tau=-1,hits=1,window_from=1,window_keep=0.36"
    deepest = selections_by_depth(policy, n_new)[-1]
    for i, pages in enumerate(deepest):
        assert min(pages) >= window(N_LAYERS, N_PROMPT + i + 1, start=1, keep=0.36, power=1.0)
    assert deepest[0] != deepest[-1]


def test_queries_side_by_side_have_the_window_of_single_steps():
    shape = geometry()
    query, keys, values = stream(shape, N_PROMPT + 1)
    policy = "prhs:block=1,window_from=1,window_keep=0.36"
    layer = new_layers(2, shape, policy=policy, **PLAIN)[1]
    take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT])
    scores = layer.score(query_rows(query[:, :, -3:]))
    below = layer.filtered(scores).isneginf().sum(-1)
    assert (below == (int(0.64 * N_PROMPT) - SINKS) // PAGE).all()
