"""Pages that all layers seal at once, by replays, against pages that each takes in by itself."""

import sys
from pathlib import Path

import pytest
import torch
from layers import geometry, new_layers, take_in, tokens
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[1] / "models"))
from recorded import record

from kvoffload.attention.decode import decode
from kvoffload.attention.fixed import FixedSteps, decode_fixed

N_LAYERS, N_PROMPT, N_STEPS = 3, 108, 40  # ten pages of four tokens; the prompt is long enough for every short fit
pytestmark = pytest.mark.usefixtures("short_fits")
PAIRS = [
    ("bounds", "none"),
    ("mean", "mean_value"),
    ("uniform", "mean_value"),
    ("quantized:group=16", "anchored:segments=5"),
    ("quantized:group=16,bits=1", "anchored:segments=600"),
    ("quantized:group=16,bits=4", "regression"),
    ("quantized:group=16", "sketch"),
    ("transform", "anchored:segments=5,dtype=bfloat16"),
    ("transform", "regression"),
    ("transform", "sketch:bits=0.5"),
]


class Counted:
    """A ``Capture`` that counts."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, call, generators):
        self.captures += 1
        results, replay = record(call, generators)

        def counted():
            self.replays += 1
            replay()

        return results, counted


def filled(selector, completion, padding, n_layers=N_LAYERS):
    """Layers with a prompt in them, and the tokens of each with those that follow."""
    shape = geometry()
    layers = new_layers(n_layers, shape, selector=selector, completion=completion)
    given = [tokens(shape, N_PROMPT + N_STEPS, seed) for seed in range(n_layers)]
    for layer, (query, keys, values) in zip(layers, given, strict=True):
        take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT], padding)
    return layers, given


def decoded(layers, given, capture=None, n_steps=N_STEPS, maker=None):
    maker, first = maker or FixedSteps(layers, capture=capture), layers[0].n_tokens
    for i in range(first, first + n_steps):
        assert maker.advance()
        for layer, (query, keys, values) in zip(layers, given, strict=True):
            decode_fixed(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
        maker.finish()


def ordinary(layers, given, steps):
    return [
        decode(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
        for layer, (query, keys, values) in zip(layers, given, strict=True)
        for i in steps
    ]


def pages_of(layer):
    return layer.store.mapped(layer.layer)[: layer.n_pages]


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 37])], ids=["whole", "padded"])
@pytest.mark.parametrize(("selector", "completion"), PAIRS)
def test_pages_of_replays_are_those_that_each_layer_takes_in(selector, completion, padding):
    """The bytes in the store, and whatever selector and completion make of them in later steps of any kind."""
    (plain, given), (layers, _) = (filled(selector, completion, padding) for _ in range(2))
    capture = Counted()
    decoded(layers, given, capture)
    ordinary(plain, given, range(N_PROMPT, N_PROMPT + N_STEPS))
    assert (capture.captures, capture.replays) == (1, 9)
    for mine, theirs in zip(layers, plain, strict=True):
        assert torch.equal(pages_of(mine), pages_of(theirs))
        assert mine.meter.written == theirs.meter.written
        mine.fix(None)
        query = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(9))
        assert_close(mine.selector.score(query), theirs.selector.score(query), atol=1e-5, rtol=1e-5)
        assert mine.selector.index_bytes == theirs.selector.index_bytes
        assert mine.completion.state_bytes == theirs.completion.state_bytes
    more = [tokens(layers[0].geometry, 30, seed) for seed in range(20, 20 + N_LAYERS)]
    for a, b in zip(ordinary(layers, more, range(30)), ordinary(plain, more, range(30)), strict=True):
        assert_close(a.output, b.output, atol=1e-4, rtol=1e-4)
        assert_close(a.lse, b.lse, atol=1e-4, rtol=1e-4)


def test_indexed_pages_are_the_same_to_the_bit():
    for selector in ("quantized:group=16", "transform"):
        (plain, given), (layers, _) = (filled(selector, "none", None) for _ in range(2))
        decoded(layers, given, record)
        ordinary(plain, given, range(N_PROMPT, N_PROMPT + N_STEPS))
        for mine, theirs in zip(layers, plain, strict=True):
            n_tokens = theirs.selector.index.n_tokens
            assert mine.selector.index.n_tokens == n_tokens
            assert torch.equal(mine.selector.index.keys(0, n_tokens), theirs.selector.index.keys(0, n_tokens))


def test_what_cannot_be_captured_is_sealed_as_it_is():
    def refuse(call, generators):
        raise RuntimeError("operation not permitted when stream is capturing")

    (plain, given), (layers, _) = (filled("quantized:group=16", "anchored", None) for _ in range(2))
    decoded(layers, given, refuse)
    ordinary(plain, given, range(N_PROMPT, N_PROMPT + N_STEPS))
    for mine, theirs in zip(layers, plain, strict=True):
        assert torch.equal(pages_of(mine), pages_of(theirs))


class Operations(TorchDispatchMode):
    """Counts those that are no views."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not any(given.alias_info and not given.alias_info.is_write for given in func._schema.returns)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("selector", "completion"), PAIRS)
def test_a_layer_more_adds_few_operations_to_a_seal(selector, completion):
    """It is more rows: what it adds is to find its page and to put it into what grows, a dozen times at most."""

    def n_operations(n_layers):
        layers, given = filled(selector, completion, None, n_layers)
        maker = FixedSteps(layers)
        while layers[0].anchors.n_unsealing:
            decoded(layers, given, maker=maker, n_steps=1)
        with Operations() as found:
            maker.advance()
        return found.n

    two, four = n_operations(2), n_operations(4)
    assert four - two <= 2 * 12


def test_layers_that_are_not_alike_are_sealed_apart():
    (plain, given), (layers, _) = (filled("bounds", "anchored:segments=5", None) for _ in range(2))
    for layer in (plain[1], layers[1]):  # as long as others, in other segments
        pages = layer.fetch.ask_pages(0, layer.n_pages, layer.fetch.refresh)()
        layer.completion.reset(torch.zeros(2, 8), n_pages=8)
        layer.completion.absorb(pages)
    decoded(layers, given, record)
    steps = range(N_PROMPT, N_PROMPT + N_STEPS)
    ordinary(plain, given, steps)
    for mine in layers:
        mine.fix(None)
    more = [tokens(layers[0].geometry, 5, seed) for seed in range(20, 20 + N_LAYERS)]
    for a, b in zip(ordinary(layers, more, range(5)), ordinary(plain, more, range(5)), strict=True):
        assert_close(a.output, b.output, atol=1e-4, rtol=1e-4)
