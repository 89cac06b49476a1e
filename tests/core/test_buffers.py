"""Growing tensors and page masks."""

import pytest
import torch
from torch.testing import assert_close

from kvoffload.buffers import Growing, Room, page_mask, tensor_bytes


def rows(n, seed=0, dtype=torch.float32):
    return torch.randn(2, n, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_what_was_appended_is_seen_in_order():
    growing, parts = Growing(), [rows(n, n) for n in (1, 4, 0, 2, 9, 1)]
    for i, part in enumerate(parts):
        growing.append(part)
        assert torch.equal(growing.view, torch.cat(parts[: i + 1], 1))
    assert len(growing) == 17


def test_appends_move_a_bounded_number_of_entries():
    """Amortised: an entry is moved nine times on the mean, where room grows by an eighth, and little stays empty."""
    growing, n_moved, held = Growing(), 0, 0
    for i in range(2048):
        growing.append(rows(1, i))
        if growing.held_bytes != held:
            n_moved, held = n_moved + i, growing.held_bytes
    assert n_moved <= 9 * 2048
    assert growing.held_bytes <= growing.used_bytes * 9 / 8


def test_only_what_is_used_is_counted():
    growing = Growing()
    assert growing.used_bytes == 0
    growing.append(rows(3, dtype=torch.float16))
    growing.append(rows(1, dtype=torch.float16))
    assert growing.used_bytes == 2 * 4 * 3 * 2


def test_a_truncated_end_is_written_over():
    growing = Growing()
    growing.append(rows(5, 0))
    growing.truncate(3)
    growing.append(rows(2, 1))
    assert torch.equal(growing.view, torch.cat([rows(5, 0)[:, :3], rows(2, 1)], 1))


@pytest.mark.parametrize("length", [7, 4])
def test_truncating_behind_the_end_changes_nothing(length):
    growing = Growing()
    growing.append(rows(4))
    growing.truncate(length)
    assert_close(growing.view, rows(4))


def test_bytes_of_tensors_add_up():
    assert tensor_bytes(torch.zeros(3, 2), torch.zeros(5, dtype=torch.int64), torch.zeros(7, dtype=torch.bool)) == 71


def test_a_page_mask_is_true_at_the_given_pairs_only():
    mask = page_mask(torch.tensor([2, 0, 2]), torch.tensor([0, 1, 1]), rows=3, n_pages=4)
    assert mask.nonzero().tolist() == [[0, 2], [1, 0], [1, 2]]
    assert mask.shape == (3, 4)


def test_a_page_mask_of_nothing_is_false():
    none = torch.zeros(0, dtype=torch.int64)
    assert not page_mask(none, none, rows=2, n_pages=3).any()


def test_wanted_pairs_are_the_only_ones_in_a_mask():
    ids, rows, wanted = torch.tensor([2, 0, 2]), torch.tensor([0, 1, 1]), torch.tensor([True, False, True])
    assert page_mask(ids, rows, 3, 4, wanted).nonzero().tolist() == [[0, 2], [1, 2]]


def test_a_held_view_has_zeros_behind_what_was_appended():
    growing = Growing()
    growing.append(rows(5, 0))
    growing.truncate(3)
    growing.hold(9)
    assert torch.equal(growing.view, torch.cat([rows(5, 0)[:, :3], torch.zeros(2, 6, 3)], 1))
    assert (len(growing), growing.used_bytes) == (3, 2 * 3 * 3 * 4)
    growing.hold(None)
    assert torch.equal(growing.view, rows(5, 0)[:, :3])


def test_a_held_view_stays_where_it_is_until_it_is_full():
    growing = Growing()
    growing.append(rows(1))
    growing.hold(20)
    places = set()
    for i in range(19):
        growing.append(rows(1, i))
        places.add(growing.view.data_ptr())
        assert growing.view.shape[1] == 20
        assert torch.equal(growing.view[:, i + 1 : i + 2], rows(1, i))
    assert len(places) == 1


def test_entries_are_put_where_a_tensor_says():
    appended, held = Growing(), Growing()
    appended.append(rows(5))
    held.append(rows(5)[:, :3])
    held.hold(8)
    for i in (3, 4):
        held.put(torch.tensor([i]), rows(5)[:, i : i + 1])
        held.count(i + 1)
    assert torch.equal(held.take(torch.tensor([4, 0])), rows(5)[:, [4, 0]])
    held.hold(None)
    assert torch.equal(held.view, appended.view)


def test_a_room_says_which_page_is_its_newest():
    room = Room(4, 8, torch.device("cpu"))
    places = room.newest.data_ptr(), room.tokens.data_ptr()
    room.fill(3)
    assert room.newest.tolist() == [2]
    assert room.tokens.tolist() == list(range(16, 24))
    assert (room.newest.data_ptr(), room.tokens.data_ptr()) == places


def test_a_room_bounds_scores_to_its_pages():
    room = Room(4, 8, torch.device("cpu"))
    room.fill(3)
    assert room.bound(torch.zeros(2, 4)).tolist() == [[0, 0, 0, -torch.inf]] * 2
    assert room.n_tokens == 32
