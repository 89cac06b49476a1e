"""Both twins of the gather against copying slice by slice; the kernel runs in triton's interpreter."""

import pytest
import torch
from kvoffload_kernels import dispatch
from kvoffload_kernels.gather import reference

TWINS = ["reference", "dispatch", "triton"]


def twin(name):
    if name == "triton":
        pytest.importorskip("triton")
        from kvoffload_kernels.gather import kernel

        return kernel.gather_slices
    return reference.gather_slices if name == "reference" else dispatch.gather_slices


def source(n, slice_bytes):
    return torch.randint(0, 256, (n, slice_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("slice_bytes", [8, 24, 8192, 8192 + 8, 16384 + 40])
@pytest.mark.parametrize("name", TWINS)
def test_slices_land_where_they_are_sent(name, slice_bytes):
    pages, out = source(7, slice_bytes), torch.full((9, slice_bytes), 0xFF, dtype=torch.uint8)
    twin(name)(pages, ids(6, 0, 3), out, ids(1, 8, 4))
    for i in range(9):
        expected = {1: pages[6], 8: pages[0], 4: pages[3]}.get(i, torch.full((slice_bytes,), 0xFF, dtype=torch.uint8))
        assert torch.equal(out[i], expected)


@pytest.mark.parametrize("name", TWINS)
def test_only_wanted_slices_move(name):
    pages, out = source(5, 40), torch.full((5, 40), 0xFF, dtype=torch.uint8)
    twin(name)(pages, ids(4, 2, 1), out, ids(0, 1, 2), torch.tensor([True, False, True]))
    assert torch.equal(out[0], pages[4])
    assert torch.equal(out[2], pages[1])
    assert (out[[1, 3, 4]] == 0xFF).all()


@pytest.mark.parametrize("name", TWINS)
def test_nothing_wanted_changes_nothing(name):
    out = torch.full((3, 16), 0xFF, dtype=torch.uint8)
    twin(name)(source(3, 16), ids(0, 1), out, ids(0, 1), torch.tensor([False, False]))
    assert (out == 0xFF).all()


@pytest.mark.parametrize("name", TWINS)
def test_without_places_slices_fill_the_front(name):
    pages, out = source(5, 24), torch.full((4, 24), 0xFF, dtype=torch.uint8)
    twin(name)(pages, ids(3, 3, 0), out)
    assert torch.equal(out[:3], pages[[3, 3, 0]])
    assert (out[3] == 0xFF).all()


@pytest.mark.parametrize("name", ["reference", "dispatch", "triton"])
def test_no_slices_are_a_call_that_does_nothing(name):
    out = torch.full((2, 16), 0xFF, dtype=torch.uint8)
    twin(name)(source(3, 16), ids(), out, ids(), torch.zeros(0, dtype=torch.bool))
    twin(name)(source(3, 16), ids(), out)
    assert (out == 0xFF).all()


@pytest.mark.parametrize("name", TWINS)
def test_wanted_without_places_leaves_the_others_alone(name):
    pages, out = source(4, 16), torch.full((3, 16), 0xFF, dtype=torch.uint8)
    twin(name)(pages, ids(3, 2, 1), out, None, torch.tensor([True, False, True]))
    assert torch.equal(out[[0, 2]], pages[[3, 1]])
    assert (out[1] == 0xFF).all()


def test_more_slices_than_programs_are_all_copied():
    kernel = twin("triton")
    pages, out = source(11, 16), torch.full((11, 16), 0xFF, dtype=torch.uint8)
    kernel(pages, torch.arange(10, -1, -1), out, torch.arange(11), n_programs=4)
    assert torch.equal(out, pages.flip(0))
