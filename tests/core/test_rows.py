"""One that stands for several."""

import torch

from kvoffload.buffers import Growing
from kvoffload.rows import Rowwise, join, kind


class Part(Rowwise):
    row_state = ("sums", "pair", "buffer", "inner", "nothing")

    def __init__(self, value, inner=None):
        self.sums, self.pair = torch.full((2, 3), value), (torch.zeros(2), torch.full((2, 1), value))
        self.buffer, self.inner, self.nothing = Growing(), inner, None
        self.buffer.append(torch.zeros(2, 4))

    def put(self, at, rows):
        self.sums += 1
        self.pair[1].mul_(2)
        self.buffer.put(at, rows)


def test_what_is_done_to_all_is_done_to_each():
    parts = [Part(1.0), Part(2.0), Part(3.0)]
    whole = join(parts, {})
    whole.put(torch.tensor([1]), torch.arange(6.0)[:, None])
    for i, part in enumerate(parts):
        assert torch.equal(part.sums, torch.full((2, 3), i + 2.0))
        assert torch.equal(part.pair[1], torch.full((2, 1), 2.0 * (i + 1)))
        assert part.buffer.view[:, 1].tolist() == [2.0 * i, 2.0 * i + 1]
    assert whole.buffer.take(torch.tensor([1])).flatten().tolist() == list(range(6))


def test_what_two_of_them_share_is_joined_once():
    shared = [Part(1.0), Part(2.0)]
    known = {}
    whole = join(shared, known)
    other = join([Part(0.0, inner) for inner in shared], known)
    assert other.inner is whole
    whole.put(torch.tensor([0]), torch.ones(4, 1))
    assert torch.equal(shared[1].sums, torch.full((2, 3), 3.0))


def test_kinds_differ_by_sizes_and_by_what_the_host_knows():
    class Counted(Part):
        n = 0

        @property
        def host_state(self):
            return self.n

    one, other, longer, deeper = Counted(1.0), Counted(2.0), Counted(3.0), Counted(1.0, Part(1.0))
    longer.sums = torch.zeros(2, 4)
    assert kind(one) == kind(other)
    assert len({kind(one), kind(longer), kind(deeper)}) == 3
    other.n = 1
    assert kind(one) != kind(other)
