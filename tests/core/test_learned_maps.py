"""Calibrated completions: the learned maps of ``phi`` against one term per token, the offsets of the others, and the
files that both come from."""

import json
from dataclasses import replace

import pytest
import torch
from heads import CPU, all_pairs, fetch, geometry, masses, random_pages, random_query, softmax_over
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.testing import assert_close

from kvoffload.completion import calibrated
from kvoffload.completion.anchored import AnchoredCompletionConfig
from kvoffload.completion.calibrated import Calibration, read_calibration, write_calibration
from kvoffload.completion.feature_maps import FAMILIES, LearnedMap, MapWeights, log_features, n_biases, n_projections
from kvoffload.completion.offset import offset_name
from kvoffload.completion.pages import PagesCompletionConfig
from kvoffload.completion.phi import PhiCompletion, PhiCompletionConfig
from kvoffload.errors import KvoffloadError, UsageError
from kvoffload.values import merge

M = 6


def header(completion="phi", layers=(0,), **options):
    made = {"family": "exp", "features": M} | options
    figures = {layer: {"output": 0.5} for layer in layers}
    return Calibration(completion=completion, model="m", weights="w", data="d", options=made, layers=figures)


def random_weights(family, n_maps, shape, seed=3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    g, r, d = shape.n_kv_heads, shape.group_size, shape.key_dim
    h, b = n_projections(family, M), n_biases(family, M)
    return MapWeights(draw(g, n_maps, h, d), draw(g, n_maps, b), draw(g, r, h, d), draw(g, r, b))


def phi_file(path, family="exp", n_maps=1, shape=None):
    weights = random_weights(family, n_maps, shape or geometry())
    write_calibration(path, header(family=family), weights.tensors(0))
    return weights


def one_phi(family, weight, bias, x):
    """Features of one vector, written out."""
    if family == "exp":
        return (weight @ x + bias).exp()
    h = weight.shape[0]
    inner = weight @ x + bias[:h]
    return torch.cat([inner.softmax(0), (-inner).softmax(0)]) * bias[h:].exp()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_maps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_phi_is_the_linear_attention_over_the_unread_tokens(tmp_path, family, n_maps, padded):
    """The state minus the fetched terms equals the sum of phi(q) . phi(k) over the unread tokens, one by one, for two
    queries of each row."""
    shape = geometry()
    pages, read = random_pages(shape, 5, padded=padded), [(0, 0), (1, 2), (3, 2), (3, 3)]
    query = torch.cat([random_query(shape, 1), random_query(shape, 2)])  # query rows 0, 1 are of row 0
    w = phi_file(tmp_path / "phi.safetensors", family, n_maps)
    completion = PhiCompletionConfig(file=tmp_path / "phi.safetensors").build(shape, 0, CPU)
    completion.absorb(pages)
    fetched = fetch(pages, [(query_row // 2, page) for query_row, page in read])
    fetched = replace(fetched, row_ids=torch.tensor([query_row for query_row, _ in read]))
    rest = completion.estimate(query, fetched, masses(query, pages))
    for query_row in range(4):
        row = query_row // 2
        for head in range(3):
            phi_q = one_phi(family, w.query_weight[row, head], w.query_bias[row, head], query[query_row, head]).double()
            mass, total = torch.tensor(0.0).double(), torch.zeros(16, dtype=torch.float64)
            for page in range(5):
                for token in range(4):
                    counts = pages.valid is None or bool(pages.valid[row, page, token])
                    if (query_row, page) in read or not counts:
                        continue
                    of_head = head % n_maps if n_maps > 1 else 0
                    key_map = w.key_weight[row, of_head], w.key_bias[row, of_head]
                    a = phi_q @ one_phi(family, *key_map, pages.keys[row, page, token]).double()
                    mass, total = mass + a, total + a * pages.values[row, page, token]
            assert_close(rest.lse[query_row, head], mass.log().float(), atol=1e-3, rtol=1e-3)
            assert_close(rest.output[query_row, head], (total / mass).float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("n_maps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_learned_map_leaves_the_merge_bit_identical_when_everything_was_fetched(tmp_path, family, n_maps):
    shape = geometry()
    pages, query = random_pages(shape, 9), random_query(shape)
    phi_file(tmp_path / "phi.safetensors", family, n_maps)
    completion = PhiCompletionConfig(file=tmp_path / "phi.safetensors").build(shape, 0, CPU)
    completion.absorb(pages)
    exact = softmax_over(query, pages, all_pairs(pages))
    merged = merge([exact, completion.estimate(query, fetch(pages, all_pairs(pages)), masses(query, pages))])
    assert torch.equal(merged.output, exact.output)
    assert torch.equal(merged.lse, exact.lse)


@pytest.mark.parametrize("n_maps", [1, 3])
def test_the_planned_bytes_of_a_learned_map_are_those_of_its_state(tmp_path, n_maps):
    shape = geometry()
    phi_file(tmp_path / "phi.safetensors", n_maps=n_maps)
    config = PhiCompletionConfig(file=tmp_path / "phi.safetensors")
    assert config.build(shape, 0, CPU).state_bytes == shape.rows * config.index_bytes(128, 8, 16, 4, 4)


def test_features_far_apart_do_not_underflow():
    """A feature whose keys are e^200 below another's counts fully where its query feature is e^200 above."""
    shape = geometry(group_size=1, n_kv_heads=1)
    pages = random_pages(shape, 3)
    query = random_query(shape)
    bias = torch.tensor([[[0.0, -200.0]]])
    zero = torch.zeros(1, 1, 2, 8)
    low = PhiCompletion(LearnedMap("exp", 2, MapWeights(zero, bias, zero, -bias), 1), shape, CPU)
    low.absorb(pages)
    rest = low.estimate(query, fetch(pages, []), masses(query, pages))
    assert_close(rest.lse, torch.full((1, 1), 2.0 * 12).log())  # two features, each e^0 for each of 12 tokens


def test_hedgehog_features_are_two_softmaxes_times_their_scales():
    x, inner, scale = torch.randn(3), torch.zeros(3), torch.tensor([0.5] * 6)
    phi = log_features("hedgehog", x, torch.cat([inner, scale])).exp()
    assert_close(phi[:3].sum(), torch.tensor(0.5).exp())
    assert_close(phi, torch.cat([x.softmax(0), (-x).softmax(0)]) * torch.tensor(0.5).exp())


@pytest.mark.parametrize("config", [AnchoredCompletionConfig, PagesCompletionConfig])
def test_an_offset_moves_the_log_mass_of_its_head_and_nothing_else(tmp_path, config):
    shape, kind = geometry(), config().kind
    pages, query, read = random_pages(shape, 9), random_query(shape), [(0, 3), (1, 4)]
    offset = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    own = config().model_dump(mode="json", exclude={"kind", "file"})
    write_calibration(tmp_path / "o", header(kind, **own), {offset_name(0): offset})
    rests = []
    for built in (config().build(shape, 0, CPU), config(file=tmp_path / "o").build(shape, 0, CPU)):
        built.reset(torch.zeros(2, 8), n_pages=9)
        built.absorb(pages)
        rests.append(built.estimate(query, fetch(pages, read), masses(query, pages)))
    plain, moved = rests
    assert torch.equal(moved.output, plain.output)
    assert_close(moved.lse, plain.lse + offset)


def test_offsets_for_another_number_of_segments_are_refused(tmp_path):
    write_calibration(tmp_path / "o", header("anchored", segments=16), {offset_name(0): torch.zeros(2, 3)})
    with pytest.raises(ValidationError, match="calibrated with segments=16, not segments=32"):
        AnchoredCompletionConfig(file=tmp_path / "o")


def hostile(path, kind):
    """A file that is no calibration of maps, in one of many ways."""
    weights = random_weights("exp", 1, geometry()).tensors(0)
    match kind:
        case "missing":
            return
        case "text":
            path.write_text("not a safetensors file")
        case "truncated":
            write_calibration(path, header(), weights)
            path.write_bytes(path.read_bytes()[:-40])
        case "huge header":
            path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
        case "no metadata":
            save_file(weights, path)
        case "other json":
            save_file(weights, path, metadata={"kvoffload": json.dumps({"format": 2})})
        case "other completion":
            write_calibration(path, header("pages"), weights)
        case "unknown family":
            write_calibration(path, header(family="fourier"), weights)
        case "no layers":
            write_calibration(path, header(layers=()), weights)
        case "missing layer":
            write_calibration(path, header(layers=(0, 1)), weights)
        case "other features":
            write_calibration(path, header(features=M + 1), weights)
        case "half precision":
            write_calibration(path, header(), {name: tensor.half() for name, tensor in weights.items()})


HOSTILE = (
    "missing", "text", "truncated", "huge header", "no metadata", "other json", "other completion", "unknown family",
    "no layers", "missing layer", "other features", "half precision",
)  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_when_the_configuration_is_read(tmp_path, kind):
    hostile(tmp_path / "phi.safetensors", kind)
    with pytest.raises(ValidationError, match=r"file .*phi.safetensors"):
        PhiCompletionConfig(file=tmp_path / "phi.safetensors")


def test_maps_for_other_sizes_are_refused_with_both(tmp_path):
    phi_file(tmp_path / "phi.safetensors", shape=geometry(key_dim=4))
    with pytest.raises(UsageError, match=r"key.weight: shape \[2, 1, 6, 4\].* needs \[2, any, 6, 8\]"):
        PhiCompletionConfig(file=tmp_path / "phi.safetensors").build(geometry(), 0, CPU)


def test_a_layer_that_was_not_calibrated_is_refused(tmp_path):
    phi_file(tmp_path / "phi.safetensors")
    with pytest.raises(UsageError, match=r"layers\.7\.key\.weight: no such"):
        PhiCompletionConfig(file=tmp_path / "phi.safetensors").build(geometry(), 7, CPU)


def test_maps_with_nan_are_refused(tmp_path):
    weights = random_weights("exp", 1, geometry())
    weights.query_bias[0, 0, 0] = float("nan")
    write_calibration(tmp_path / "phi.safetensors", header(), weights.tensors(0))
    with pytest.raises(UsageError, match="not finite"):
        PhiCompletionConfig(file=tmp_path / "phi.safetensors").build(geometry(), 0, CPU)


def test_a_header_comes_back_as_it_was_written_and_equal_contents_are_equal_files(tmp_path):
    weights = random_weights("exp", 1, geometry()).tensors(0)
    for name in ("a", "b"):
        write_calibration(tmp_path / name, header(), weights)
    assert read_calibration(tmp_path / "a", "phi").header == header()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    phi_file(tmp_path / "phi.safetensors")
    before = (tmp_path / "phi.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(calibrated, "save_file", full)
    with pytest.raises(KvoffloadError, match="cannot be written: No space left"):
        phi_file(tmp_path / "phi.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["phi.safetensors"]
    assert (tmp_path / "phi.safetensors").read_bytes() == before
