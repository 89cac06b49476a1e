"""Top-K against a list of shares sorted in plain Python."""

import math

import pytest
import torch

from kvoffload.selection.topk import HeadBounds, select_top

ROWS, GROUP, PAGES = 6, 3, 11  # three sequences of two kv heads, or one of six


def inputs(seed=0, n_pages=PAGES):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(ROWS, GROUP, n_pages, generator=generator), 3 * torch.randn(ROWS, GROUP, generator=generator)


def pairs(selection):
    found = list(zip(selection.row_ids.tolist(), selection.page_ids.tolist(), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


def best(scores, anchor_lse, rows, n):
    """The n (row, page) pairs with the largest share of the mass, summed over query heads."""
    shares = {}
    for row in rows:
        for page in range(scores.shape[-1]):
            shares[row, page] = 0.0
            for head in range(GROUP):
                total = sum(math.exp(z) for z in scores[row, head].tolist()) + math.exp(anchor_lse[row, head])
                shares[row, page] += math.exp(scores[row, head, page]) / total
    return set(sorted(shares, key=shares.__getitem__, reverse=True)[:n])


@pytest.mark.parametrize("n_slices", [1, 5, 13])
@pytest.mark.parametrize("n_sequences", [1, 3])
def test_heads_of_a_sequence_compete_for_a_pooled_budget(n_sequences, n_slices):
    scores, anchor_lse = inputs()
    given = select_top(scores, anchor_lse, n_sequences=n_sequences, n_slices=n_slices, pool="layer")
    n_heads = ROWS // n_sequences
    expected = set()
    for sequence in range(n_sequences):
        expected |= best(scores, anchor_lse, range(sequence * n_heads, (sequence + 1) * n_heads), n_slices)
    assert pairs(given) == expected


@pytest.mark.parametrize(("n_slices", "each"), [(6, 1), (11, 1), (18, 3)])
def test_without_a_pool_every_head_has_its_equal_part(n_slices, each):
    scores, anchor_lse = inputs()
    given = select_top(scores, anchor_lse, n_sequences=1, n_slices=n_slices, pool="none")
    assert pairs(given) == set().union(*(best(scores, anchor_lse, [row], each) for row in range(ROWS)))


def test_sequences_never_share_a_budget():
    scores, anchor_lse = inputs()
    scores[:2] += 1000.0
    given = select_top(scores, anchor_lse, n_sequences=3, n_slices=4, pool="layer")
    assert torch.bincount(given.row_ids // 2).tolist() == [4, 4, 4]


@pytest.mark.parametrize("pool", ["layer", "none"])
def test_a_budget_beyond_the_pages_takes_all_of_them(pool):
    scores, anchor_lse = inputs()
    given = select_top(scores, anchor_lse, n_sequences=3, n_slices=1000, pool=pool)
    assert pairs(given) == {(row, page) for row in range(ROWS) for page in range(PAGES)}


@pytest.mark.parametrize("pool", ["layer", "none"])
def test_a_budget_of_nothing_selects_nothing(pool):
    assert len(select_top(*inputs(), n_sequences=1, n_slices=0, pool=pool)) == 0


def test_a_head_whose_mass_lies_in_its_anchors_gives_its_part_away():
    scores, anchor_lse = inputs()
    scores[1:] = scores[0]
    anchor_lse[:] = -5.0
    anchor_lse[:5] = 50.0
    given = select_top(scores, anchor_lse, n_sequences=1, n_slices=PAGES, pool="layer")
    assert set(given.row_ids.tolist()) == {5}


def test_query_heads_count_by_share_and_not_by_the_size_of_their_scores():
    """One head's scores are all larger by a constant, which is no reason to follow it."""
    scores, anchor_lse = inputs()
    moved, anchors_moved = scores.clone(), anchor_lse.clone()
    moved[:, 0] += 40.0
    anchors_moved[:, 0] += 40.0
    given, expected = (
        select_top(s, a, n_sequences=1, n_slices=9, pool="layer")
        for s, a in ((moved, anchors_moved), (scores, anchor_lse))
    )
    assert pairs(given) == pairs(expected)


@pytest.mark.parametrize("pool", ["layer", "none"])
def test_empty_pages_come_last(pool):
    scores, anchor_lse = inputs()
    scores[:, :, :4] = -torch.inf
    given = select_top(scores, anchor_lse, n_sequences=1, n_slices=ROWS * (PAGES - 4), pool=pool)
    assert given.page_ids.min() == 4


def test_the_size_of_a_selection_depends_on_the_budget_alone():
    sizes = {len(select_top(*inputs(seed), n_sequences=3, n_slices=7, pool="layer")) for seed in range(10)}
    assert sizes == {21}


@pytest.mark.parametrize("n_wanted", [0, 2, 5])
@pytest.mark.parametrize("pool", ["layer", "none"])
def test_of_each_list_only_the_best_are_wanted(pool, n_wanted):
    scores, anchor_lse = inputs()
    options = {"n_sequences": 3, "pool": pool}
    n_lists = 1 if pool == "layer" else 2
    given = select_top(scores, anchor_lse, n_slices=5 * n_lists, n_wanted=torch.tensor(n_wanted), **options)
    expected = select_top(scores, anchor_lse, n_slices=n_wanted * n_lists, **options)
    found = zip(given.row_ids[given.wanted].tolist(), given.page_ids[given.wanted].tolist(), strict=True)
    assert len(given) == 3 * n_lists * 5
    assert set(found) == pairs(expected)


def bounded(bounds, n_slices=18, shift=0.0):
    """A selection of one sequence of six heads, of which all but the first have ``shift`` nats less in every page."""
    scores, anchor_lse = inputs()
    scores[1:] -= shift
    given = select_top(scores, anchor_lse, n_sequences=1, n_slices=n_slices, pool="layer", bounds=bounds)
    return scores, anchor_lse, given


@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0])
def test_a_floor_leaves_every_head_its_best_pages(shift):
    scores, anchor_lse, given = bounded(HeadBounds(floor=0.67), shift=shift)
    assert len(pairs(given)) == 18
    for row in range(ROWS):
        assert best(scores, anchor_lse, [row], 2) <= pairs(given)


def test_a_cap_bounds_every_head_and_gives_the_rest_to_the_others():
    scores, anchor_lse, given = bounded(HeadBounds(cap=1.34), shift=20.0)
    assert torch.bincount(given.row_ids, minlength=ROWS).tolist()[0] == 5  # 1.34 * 3, rounded up
    assert len(pairs(given)) == 18
    assert best(scores, anchor_lse, [0], 5) <= pairs(given)


def test_a_floor_and_a_cap_of_one_are_no_pool():
    scores, anchor_lse, given = bounded(HeadBounds(floor=1.0, cap=1.0))
    assert pairs(given) == pairs(select_top(scores, anchor_lse, n_sequences=1, n_slices=18, pool="none"))


@pytest.mark.parametrize("bounds", [HeadBounds(floor=1.0), HeadBounds(cap=1.0), HeadBounds(0.5, 2.0)])
def test_bounds_leave_a_full_budget_alone(bounds):
    assert len(pairs(bounded(bounds, n_slices=1000)[2])) == ROWS * PAGES
