"""One step of one layer: what it attends to, in which order it asks, and what it counts."""

import pytest
import torch
from heads import CPU, geometry
from kvoffload_storage import MemoryStore, StoreShape, Ticket, WrapperStore
from torch.testing import assert_close

from kvoffload.attention import decode as decode_module
from kvoffload.attention import prefill
from kvoffload.attention.build import build_layer
from kvoffload.attention.decode import decode
from kvoffload.attention.prefill import attend_chunk, prepare, refill
from kvoffload.cache.slots import Staging
from kvoffload.completion.gated import ABSTAIN
from kvoffload.config import RuntimeConfig
from kvoffload.geometry import Geometry
from kvoffload.values import Partial


def config(**fields):
    return RuntimeConfig(**({"sinks": 4, "recent": 8, "page_size": 4, "budget": "20%", "selector": "bounds"} | fields))


def new_layer(settings, shape=None, wrap=lambda store: store):
    shape = shape or geometry()
    store = wrap(MemoryStore(StoreShape(1, shape.rows, shape.slice_bytes), tier="cpu"))
    empty = torch.zeros(shape.rows, 0, shape.key_dim), torch.zeros(shape.rows, 0, shape.value_dim)
    staging = Staging(shape.slice_bytes, CPU)
    return build_layer(settings, shape, store, 0, model_layer=0, staging=staging, keys=empty[0], values=empty[1])


def tokens(shape, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        (shape.rows, shape.group_size, n, shape.key_dim),
        (shape.rows, n, shape.key_dim),
        (shape.rows, n, shape.value_dim),
    )
    return [torch.randn(size, generator=generator) for size in sizes]


def take_in(layer, query, keys, values, chunk=None):
    """Prefill in chunks as the seam does; the partials of all of them."""
    parts, n = [], keys.shape[1]
    for start in range(0, n, chunk or n):
        piece = slice(start, start + (chunk or n))
        given = query[:, :, piece], keys[:, piece], values[:, piece]
        parts.append(attend_chunk(layer, *given))
        prefill.take_in(layer, *given, whole=False)
    prepare(layer)
    return Partial(torch.cat([p.output for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def dense(shape, query, keys, values, first=0):
    """Causal attention in fp64; query i sees keys 0 .. first + i."""
    logits = torch.einsum("grqd,gnd->grqn", query.double() * shape.scale, keys.double())
    seen = torch.ones(query.shape[2], keys.shape[1], dtype=torch.bool).tril(first)
    if shape.softcap is not None:
        logits = shape.softcap * (logits / shape.softcap).tanh()
    logits = logits.masked_fill(~seen, -torch.inf)
    return Partial((logits.softmax(-1) @ values[:, None].double()).float(), logits.logsumexp(-1).float())


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [None, 1, 7, 16])
def test_a_prefill_in_chunks_is_dense_causal_attention(chunk, softcap):
    shape = Geometry(1, 2, 3, 8, 16, 4, torch.float32, 0.5, softcap)
    query, keys, values = tokens(shape, 45)
    given, expected = take_in(new_layer(config(), shape), query, keys, values, chunk), dense(shape, query, keys, values)
    assert_close(given.output, expected.output, atol=1e-5, rtol=1e-5)
    assert_close(given.lse, expected.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gpu_cache", ["off", "4KiB"])
@pytest.mark.parametrize(("budget", "completion"), [("100%", "none"), ("20%", "exact"), ("0%", "exact")])
def test_steps_that_lose_nothing_are_dense_attention(budget, completion, gpu_cache):
    layer = new_layer(config(budget=budget, completion=completion, gpu_cache=gpu_cache))
    shape = layer.geometry
    query, keys, values = tokens(shape, 70)
    take_in(layer, query[:, :, :40], keys[:, :40], values[:, :40])
    for i in range(40, 70):
        given = decode(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
        expected = dense(shape, query[:, :, i : i + 1], keys[:, : i + 1], values[:, : i + 1], first=i)
        assert_close(given.output, expected.output[:, :, 0], atol=1e-5, rtol=1e-5)
        assert_close(given.lse, expected.lse[:, :, 0], atol=1e-5, rtol=1e-5)


def test_before_the_first_page_a_step_reads_the_anchors_only():
    layer = new_layer(config(completion="none"))
    shape = layer.geometry
    query, keys, values = tokens(shape, 12)
    take_in(layer, query[:, :, :10], keys[:, :10], values[:, :10])
    for i in (10, 11):
        given = decode(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
        expected = dense(shape, query[:, :, i : i + 1], keys[:, : i + 1], values[:, : i + 1], first=i)
        assert_close(given.output, expected.output[:, :, 0], atol=1e-5, rtol=1e-5)
    assert (layer.n_pages, layer.meter.steps, layer.fetch.n_asked) == (0, 0, 0)


class LoggedTicket(Ticket):
    def __init__(self, inner, log):
        self.inner, self.log = inner, log

    def wait(self):
        self.log.append("wait")
        return self.inner.wait()


class LoggedStore(WrapperStore):
    """Not addressable; writes down when a read starts and when it is waited for."""

    def __init__(self, inner, log):
        super().__init__(inner)
        self.log = log

    def mapped(self, layer):
        return None

    def read_slices(self, layer, page_ids, slice_ids, out):
        self.log.append("start")
        return LoggedTicket(self.inner.read_slices(layer, page_ids, slice_ids, out), self.log)


def logged_layer(log, settings, monkeypatch):
    layer = new_layer(settings, wrap=lambda store: LoggedStore(store, log))
    query, keys, values = tokens(layer.geometry, 60)
    take_in(layer, query, keys, values)
    weigh, attend_slices = Partial.weigh, decode_module.attend_slices

    def weigh_and_log(logits, values):
        log.append("anchors")
        return weigh(logits, values)

    def attend_and_log(*args):
        log.append(f"{len(args[1])} slices")
        return attend_slices(*args)

    monkeypatch.setattr(Partial, "weigh", staticmethod(weigh_and_log))
    monkeypatch.setattr(decode_module, "attend_slices", attend_and_log)
    return layer


def step(layer, seed=9):
    query, key, value = tokens(layer.geometry, 1, seed)
    return decode(layer, query[:, :, 0], key, value)


def test_anchors_come_first_since_their_mass_decides_what_is_read(monkeypatch):
    log = []
    layer = logged_layer(log, config(completion="none"), monkeypatch)
    log.clear()
    step(layer)
    assert log == ["anchors", "start", "wait", "6 slices"]  # 20% of 61 tokens of two heads: 24.4 tokens, six slices


def test_resident_pages_are_attended_to_while_the_others_travel(monkeypatch):
    log = []
    layer = logged_layer(log, config(completion="none", gpu_cache="64KiB"), monkeypatch)
    step(layer)
    log.clear()
    step(layer)  # the same query again: the same pages, as long as no page seals
    assert log == ["anchors", "start", "6 slices", "wait", "0 slices"]


def test_a_step_counts_its_context_and_its_state():
    layer = new_layer(config(completion="pages", selector="exact"))
    query, keys, values = tokens(layer.geometry, 60)
    take_in(layer, query, keys, values)
    state = index = 0
    for _ in range(5):
        step(layer)
        state += layer.completion.state_bytes
        index += layer.selector.index_bytes
    assert (layer.meter.steps, layer.meter.context_tokens) == (5, 61 + 62 + 63 + 64 + 65)
    assert (layer.meter.state_bytes_touched, layer.meter.index_bytes_read) == (state, index)


def test_the_mass_given_to_the_completion_is_counted():
    layer = new_layer(config(completion="exact", budget="0%"))
    shape = layer.geometry
    query, keys, values = tokens(shape, 60)
    take_in(layer, query[:, :, :59], keys[:, :59], values[:, :59])
    decode(layer, query[:, :, 59], keys[:, 59:], values[:, 59:])
    n_sealed = layer.n_pages * 4
    weights = torch.einsum("grd,gnd->grn", query[:, :, 59] * shape.scale, keys).softmax(-1)
    assert_close(layer.meter.completion_mass, weights[..., 4 : 4 + n_sealed].sum(-1).mean(), atol=1e-5, rtol=1e-5)


def test_pages_that_seal_while_generating_can_be_selected_at_once():
    layer = new_layer(config(completion="none", budget="100%"))
    query, keys, values = tokens(layer.geometry, 40)
    take_in(layer, query, keys, values)
    before = layer.n_pages
    for seed in range(8):
        step(layer, seed)
        assert layer.selector.score(query[:, :, 0]).shape[-1] == layer.n_pages == layer.anchors.n_sealed
    assert layer.n_pages == before + 2


def test_the_uniform_control_reads_the_same_pages_whatever_the_query():
    layer = new_layer(config(selector="uniform", completion="none", budget="10%"))
    query, keys, values = tokens(layer.geometry, 90)
    take_in(layer, query, keys, values)
    selections = []
    for i in (0, 1):
        q = 3 * query[:, :, i]
        logits = decode_module.anchor_logits(layer, q, layer.anchors.seen(1))
        chosen, _ = layer.select(q, logits.logsumexp(-1))
        selections.append(set(zip(chosen.row_ids.tolist(), chosen.page_ids.tolist(), strict=True)))
    assert selections[0] == selections[1]


def test_a_refilled_layer_steps_like_its_source():
    settings = config(completion="anchored")
    source, copy = new_layer(settings), new_layer(settings)
    query, keys, values = tokens(source.geometry, 60)
    take_in(source, query, keys, values)
    refill(copy, source)
    prepare(copy)
    for seed in range(9):
        given, expected = step(copy, seed), step(source, seed)
        assert_close(given.output, expected.output, atol=1e-6, rtol=1e-6)
        assert_close(given.lse, expected.lse, atol=1e-6, rtol=1e-6)


def gated(completion, budget="10%"):
    return new_layer(config(completion=completion, gate=True, budget=budget))


def test_the_gate_takes_a_completion_that_is_exact():
    layer = gated("anchored")
    query, keys, values = tokens(layer.geometry, 90)
    keys = keys[:, :1].expand_as(keys).clone()  # one key: the summary is exact, and dropping anything is not
    take_in(layer, query, keys, values)
    assert (layer.gate.choice == 1).all()


def test_the_gate_takes_the_better_of_two():
    layer = gated("anchored+exact")
    take_in(layer, *tokens(layer.geometry, 90))
    assert (layer.gate.choice == 2).all()


def test_the_gate_abstains_where_the_remainder_is_nothing():
    """Row 0 looks at its sinks alone (everything else weighs e^-200), so all choices are equal; row 1 does not."""
    layer = gated("anchored")
    query, keys, values = tokens(layer.geometry, 90)
    query[0], keys[0] = 0.0, 0.0
    query[0, :, :, 0], keys[0, 4:, 0] = 1.0, -200.0
    keys[1] = keys[1, :1]
    take_in(layer, query, keys, values)
    assert (layer.gate.choice[0] == ABSTAIN).all()
    assert (layer.gate.choice[1] == 1).all()


def test_the_gates_choice_is_the_least_error_on_the_last_queries():
    """Against errors that are measured from outside: every choice is forced in turn on a copy of the layer."""
    settings = config(completion="anchored:segments=2+phi+pages", gate=True, budget="10%")
    layer = new_layer(settings)
    shape = layer.geometry
    query, keys, values = tokens(shape, 90)
    take_in(layer, query, keys, values)
    last = range(90 - 64, 90)
    exact = dense(shape, query, keys, values, first=90).output  # the gate's queries see the whole window
    errors = torch.zeros(4, shape.rows, shape.group_size)
    for choice in range(4):
        for i in last:
            errors[choice] += (forced(layer, choice, query[:, :, i]) - exact[:, :, i]).norm(dim=-1) / len(last)
    best, second = errors.sort(0).values[:2]
    assert ((second - best) > 1e-5).all()
    assert torch.equal(layer.gate.choice, errors.argmin(0))


def forced(layer, choice, query):
    """The step's result for a query [rows, R, D] under one choice for all heads, without a new token."""
    kept, layer.gate.choice = layer.gate.choice, torch.full((layer.geometry.rows, layer.geometry.group_size), choice)
    append, layer.append = layer.append, lambda key, value: None
    try:
        return decode(layer, query, None, None).output
    finally:
        layer.gate.choice, layer.append = kept, append


def test_a_recheck_takes_the_least_error_on_the_newest_queries():
    settings = config(
        completion="anchored:segments=2+phi+pages", gate=True, budget="10%", gate_recheck=16, gate_queries=6
    )
    layer = new_layer(settings)
    shape = layer.geometry
    query, keys, values = tokens(shape, 112)
    take_in(layer, query[:, :, :90], keys[:, :90], values[:, :90])
    for i in range(90, 106):
        layer.gate.choice = torch.zeros(shape.rows, shape.group_size, dtype=torch.int64)
        decode(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
    rechecked, layer.upkeep = layer.gate.choice, ()
    exact = dense(shape, query[:, :, :106], keys[:, :106], values[:, :106], first=106).output
    errors = torch.zeros(4, shape.rows, shape.group_size)
    for choice in range(4):
        for i in range(100, 106):
            errors[choice] += (forced(layer, choice, query[:, :, i]) - exact[:, :, i]).norm(dim=-1)
    best, second = errors.sort(0).values[:2]
    assert ((second - best) > 1e-5).all()
    assert torch.equal(rechecked, errors.argmin(0))


def test_a_recheck_is_read_and_counted_as_decode_reads():
    layers = [new_layer(config(completion="pages", gate=True, gate_recheck=n, gate_queries=6)) for n in ("off", 16)]
    for layer in layers:
        query, keys, values = tokens(layer.geometry, 110)
        take_in(layer, query[:, :, :90], keys[:, :90], values[:, :90])
        for i in range(90, 110):
            decode(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
    without, checked = layers
    n_pages, slices = (106 - 4 - 8) // 4, checked.budget(106)
    recheck = n_pages * checked.store.shape.page_bytes + 6 * slices * checked.geometry.slice_bytes
    assert checked.fetch.decode.total().cpu == without.fetch.decode.total().cpu + recheck
    assert checked.fetch.prefill.total() == without.fetch.prefill.total()
    assert checked.meter.steps == without.meter.steps


@pytest.mark.parametrize(("margin", "expected"), [(0.0, [0, 2, 1]), (0.15, [0, 2, 0]), (0.4, [0, 0, 0])])
def test_a_completion_must_beat_abstaining_by_the_margin(margin, expected):
    """And where two are equal the first wins, abstaining before all."""
    layer = new_layer(config(completion="anchored+pages", gate=True, gate_margin=margin))
    errors = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.8, 0.9], [1.0, 0.7, 0.9]])[:, None]
    layer.gate.choose(errors)
    assert layer.gate.choice.tolist() == [expected]


def test_the_gate_looks_at_as_many_queries_as_it_is_told():
    layer = new_layer(config(completion="pages", gate=True, gate_queries=7))
    take_in(layer, *tokens(layer.geometry, 90))
    page_bytes, slices = layer.store.shape.page_bytes, layer.budget(90) * layer.geometry.slice_bytes
    assert layer.fetch.prefill.total().cpu == 2 * layer.n_pages * page_bytes + 7 * slices  # summaries, truth, trials


def test_setting_the_gate_leaves_the_decode_counts_alone():
    layer = gated("anchored+pages")
    take_in(layer, *tokens(layer.geometry, 90))
    assert (layer.fetch.n_asked, layer.fetch.decode.total().cpu, layer.meter.steps) == (0, 0, 0)
    assert layer.fetch.prefill.total().cpu > 0


def test_a_gate_without_pages_stays_open():
    layer = gated("anchored")
    take_in(layer, *tokens(layer.geometry, 9))
    assert layer.gate.choice is None
