"""Where each token is kept, against a model that lists slots: every real token in exactly one place."""

import pytest
import torch
from torch.testing import assert_close

from kvoffload.cache.anchors import Anchors
from kvoffload.values import Pages

ROWS, KEY_DIM, VALUE_DIM = 3, 2, 3


def tokens(first, n):
    """Keys that say their row and slot (row * 1000 + slot), and values that are their negative."""
    name = torch.arange(ROWS)[:, None] * 1000.0 + torch.arange(first, first + n)
    return name[..., None].expand(-1, -1, KEY_DIM).clone(), -name[..., None].expand(-1, -1, VALUE_DIM).clone()


class Kept:
    """Anchors, and a copy of everything that left them."""

    def __init__(self, n_sinks=4, recent=8, page_size=4, padding=None):
        first = torch.zeros(ROWS, 0, KEY_DIM), torch.zeros(ROWS, 0, VALUE_DIM)
        self.anchors = Anchors(ROWS, n_sinks, recent, page_size, *first)
        self.padding = None if padding is None else torch.tensor(padding)
        self.sealed: list[Pages] = []

    def append(self, n):
        """As the seam does: the padding known so far is that of the tokens given so far."""
        anchors = self.anchors
        if self.padding is not None:
            anchors.padding = self.padding.clamp_max(anchors.n_tokens + n)
        before = anchors.n_sealed
        pages = anchors.append(*tokens(anchors.n_tokens, n))
        if pages is not None:
            assert pages.n_pages == anchors.n_sealed - before
            self.sealed.append(Pages(pages.keys.clone(), pages.values.clone(), pages.valid))
        else:
            assert anchors.n_sealed == before

    def slots(self, row):
        """Slots in the sinks and the window together, and in the sealed pages, as what is stored there tells."""
        anchors = self.anchors
        keys = anchors.keys[row][anchors.valid().expand(ROWS, -1)[row]]
        values = anchors.values[row][anchors.valid().expand(ROWS, -1)[row]]
        assert_close(values[:, 0], -keys[:, 0])
        n_pages, page_ids = anchors.n_sealed, torch.arange(anchors.n_sealed)
        valid = anchors.page_valid(page_ids, torch.full((n_pages,), row))
        paged = torch.cat([p.keys[row] for p in self.sealed]) if self.sealed else torch.zeros(0, anchors.page_size, 2)
        paged = paged[..., 0].flatten() if valid is None else paged[..., 0][valid]
        return [int(x) - row * 1000 for x in keys[:, 0]], [int(x) - row * 1000 for x in paged]

    def check(self):
        n, padding = self.anchors.n_tokens, [0] * ROWS if self.padding is None else self.padding.tolist()
        for row in range(ROWS):
            near, paged = self.slots(row)
            assert sorted(near + paged) == list(range(padding[row], n)), f"row {row} of {n} tokens"
            assert paged == sorted(paged)


SIZES = [
    {},
    {"n_sinks": 0},
    {"n_sinks": 1, "recent": 1},
    {"n_sinks": 7, "recent": 5},
    {"n_sinks": 16, "recent": 12},
]
PADDINGS = [None, [0, 0, 0], [3, 0, 11], [0, 20, 5]]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_in_exactly_one_place_after_random_appends(sizes, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = Kept(**sizes, padding=padding)
    while kept.anchors.n_tokens < 80:
        kept.append(
            1 if torch.rand((), generator=generator) < 0.5 else int(torch.randint(1, 24, (), generator=generator))
        )
        kept.check()


@pytest.mark.parametrize("sizes", SIZES)
def test_pages_do_not_depend_on_how_tokens_came(sizes):
    at_once, one_by_one, chunks = Kept(**sizes), Kept(**sizes), Kept(**sizes)
    at_once.append(61)
    for _ in range(61):
        one_by_one.append(1)
    for n in (2, 19, 1, 1, 30, 8):
        chunks.append(n)
    whole = torch.cat([p.keys for p in at_once.sealed], 1)
    for other in (one_by_one, chunks):
        assert torch.equal(torch.cat([p.keys for p in other.sealed], 1), whole)
        assert other.anchors.n_window == at_once.anchors.n_window


@pytest.mark.parametrize("sizes", SIZES)
def test_the_window_holds_what_is_recent_and_less_than_a_page_more(sizes):
    kept = Kept(**sizes)
    recent, n_sinks = sizes.get("recent", 8), sizes.get("n_sinks", 4)
    for n_tokens in range(1, 60):
        kept.append(1)
        middle = max(n_tokens - n_sinks, 0)
        rounded = -(-recent // 4) * 4
        assert min(middle, recent) <= kept.anchors.n_window < rounded + 4
        assert kept.anchors.n_sealed == max(middle - rounded, 0) // 4


def test_page_p_begins_behind_the_sinks():
    kept = Kept(n_sinks=3, recent=4)
    kept.append(40)
    assert kept.slots(1)[1] == list(range(3, 3 + 4 * kept.anchors.n_sealed))
    assert kept.anchors.n_sealed == 8  # 37 tokens behind the sinks, 4 stay, 33 make 8 pages


def test_the_buffers_do_not_grow():
    kept = Kept()
    kept.append(1)
    before = kept.anchors.resident_bytes
    kept.append(200)
    assert kept.anchors.resident_bytes == before == ROWS * (4 + 8 + 4) * (KEY_DIM + VALUE_DIM) * 4


def test_sinks_of_a_padded_row_are_its_first_real_tokens():
    kept = Kept(n_sinks=2, padding=[0, 5, 1])
    kept.append(30)
    sinks = kept.anchors.keys[:, :2, 0] - torch.arange(ROWS)[:, None] * 1000
    assert sinks.tolist() == [[0, 1], [5, 6], [1, 2]]


@pytest.mark.parametrize("padding", PADDINGS)
def test_runs_and_single_pages_agree_on_what_counts(padding):
    kept = Kept(padding=padding)
    kept.append(70)
    run = kept.anchors.run_valid(2, 7)
    rows, pages = torch.meshgrid(torch.arange(ROWS), torch.arange(2, 9), indexing="ij")
    single = kept.anchors.page_valid(pages.flatten(), rows.flatten())
    if padding is None:
        assert run is None
        assert single is None
    else:
        assert torch.equal(run.flatten(0, 1), single)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("n_cropped", [1, 5, 8])
def test_cropped_tokens_are_gone_and_others_can_follow(padding, n_cropped):
    kept = Kept(padding=padding)
    kept.append(42)
    kept.anchors.crop(n_cropped)
    assert kept.anchors.n_tokens == 42 - n_cropped
    kept.check()
    for n in (1, 1, 9, 1, 20):
        kept.append(n)
        kept.check()


def test_a_sealed_token_cannot_be_cropped():
    kept = Kept()
    kept.append(42)
    n_window = kept.anchors.n_window
    with pytest.raises(ValueError, match=f"cannot crop {n_window + 1} tokens: only the newest {n_window}"):
        kept.anchors.crop(n_window + 1)
    kept.check()


def test_a_copy_holds_the_same_tokens_and_shares_none():
    kept, copy = Kept(padding=[0, 3, 0]), Kept()
    kept.append(42)
    copy.anchors.copy_from(kept.anchors)
    copy.sealed, copy.padding = list(kept.sealed), kept.padding
    copy.check()
    for _ in range(9):
        kept.append(1)
    copy.check()
