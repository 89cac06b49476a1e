"""Projections of one input as one product: the same results, a model that looks as before, and what cannot be joined
left alone."""

import threading
from copy import deepcopy

import pytest
import torch
from families import FAMILIES, family_model
from test_compiled import break_compiler, error_of, forwards, open_model, steps
from torch import nn
from transformers import AutoModelForCausalLM

from kvoffload.config import RuntimeConfig
from kvoffload.models import compiled
from kvoffload.models.cache import OffloadCache
from kvoffload.models.compiled import Glue
from kvoffload.models.feed import feed
from kvoffload.models.joined import find_joints, join

GROUPS = {"phi3": 0, "gpt_oss": 1}  # of a layer; the others have two
IDS = torch.arange(2, 42)[None]


def opened(family="llama"):
    """Its biases are not zero."""
    model = open_model(family)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, std=0.15)
    return model


def joined(model):
    join(model)
    return model


def joints(model):
    return [joint for module in model.modules() for joint in find_joints(module)]


@torch.inference_mode()
def step(model, glue, n_sequences=1, **fields):
    """Logits of one step; it need not be of fixed shapes."""
    ids = IDS.repeat(n_sequences, 1)
    with OffloadCache(model.config, RuntimeConfig(sinks=4, recent=8, page_size=4, **fields)) as cache:
        model(ids, past_key_values=cache, use_cache=True)
        feed(model, cache, ids[:, :1])  # prepares what follows
        with compiled.fused(glue):
            return feed(model, cache, ids[:, :1])[:, -1]


def count_products(monkeypatch):
    """Every product is told."""
    linear, told = nn.functional.linear, []
    monkeypatch.setattr(nn.functional, "linear", lambda *given: (told.append(1), linear(*given))[1])
    return told


@pytest.mark.parametrize("family", FAMILIES)
def test_a_joined_model_is_the_same_model(family):
    """Names, values, what a plain forward gives, and the bytes of its weights."""
    model = opened(family)
    before, expected = deepcopy(model.state_dict()), model(IDS, use_cache=False).logits
    parameters = dict(model.named_parameters())
    join(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(model(IDS, use_cache=False).logits, expected)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    found = joints(model)
    assert len(found) == GROUPS.get(family, 2) * model.config.num_hidden_layers
    assert all(len({x.weight.untyped_storage().data_ptr() for x in joint.layers}) == 1 for joint in found)


@pytest.mark.parametrize("n_sequences", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_a_joined_model_are_its_own(family, n_sequences, monkeypatch):
    model = opened(family)
    expected, told = step(model, None, n_sequences), count_products(monkeypatch)
    break_compiler(monkeypatch, lambda function: function)
    join(model)
    glue = Glue(model)
    assert error_of(step(model, glue, n_sequences), expected) < 1e-5
    told.clear()
    assert error_of(step(model, glue, n_sequences), expected) < 1e-5
    with_joints = len(told)
    told.clear()
    assert torch.equal(step(model, None, n_sequences), expected)
    spared = {0: 0, 1: 2, 2: 3}[GROUPS.get(family, 2)]
    assert len(told) - with_joints == spared * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_steps_of_fixed_shapes_are_the_models_own(family, monkeypatch):
    """Several rows too, whose values are not contiguous then."""
    break_compiler(monkeypatch, lambda function: function)
    model = opened(family)
    expected = {n: steps(model, None, n) for n in (1, 3)}
    glue, before = Glue(joined(model)), forwards(model)
    for n_sequences in (1, 3, 1):
        assert error_of(steps(model, glue, n_sequences), expected[n_sequences]) < 1e-5
    assert forwards(model) == before


def test_a_compiled_layer_has_one_product_for_gate_and_up(monkeypatch):
    """In what torch.compile makes of it, which is the same for all layers."""
    compile_, products = torch.compile, []

    def backend(graph, inputs):
        products.append(sum(node.target is nn.functional.linear for node in graph.graph.nodes))
        return graph

    break_compiler(monkeypatch, lambda function: compile_(function, backend=backend))
    model = opened()
    expected = steps(model, None)
    assert error_of(steps(joined(model), Glue(model)), expected) < 1e-5
    assert sorted(products) == [0, 0, 0, 2]


def test_queries_are_guessed_by_joints_too(monkeypatch):
    """A look ahead asks for a layer's projections twice a step, of two inputs."""
    break_compiler(monkeypatch, lambda function: function)
    model = opened()
    fields = {"look_ahead": True, "budget": "20%"}
    expected, glue = step(model, None, **fields), Glue(joined(model))
    step(model, glue, **fields)
    told = count_products(monkeypatch)
    assert error_of(step(model, glue, **fields), expected) < 1e-5
    n_ahead = len(told)
    told.clear()
    step(model, glue)
    assert n_ahead == len(told) + 3  # all layers but the first
    assert glue.note.endswith("8 products of joined weights")


def test_a_joined_model_is_saved_as_any(tmp_path):
    model = joined(opened())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not joints(again)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_weights_that_were_moved_are_multiplied_where_they_are(monkeypatch):
    break_compiler(monkeypatch, lambda function: function)
    model = joined(opened())
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.data = torch.zeros_like(attention.k_proj.weight)
    assert len(joints(model)) == 7
    expected = step(model, None)
    assert error_of(step(model, Glue(model)), expected) < 1e-5
    assert not joints(model.double())


class _Quantised(nn.Linear):
    pass


def quantise(mlp):
    mlp.up_proj = _Quantised(64, 96, bias=False)


def tie(mlp):
    mlp.up_proj.weight = mlp.gate_proj.weight


def hook(mlp):
    mlp.up_proj.register_forward_hook(lambda module, args, output: 2 * output)


def wrap(mlp):
    mlp.up_proj.forward = mlp.up_proj.forward


def bias(mlp):
    mlp.up_proj.bias = nn.Parameter(torch.ones(96))


def widen(mlp):
    mlp.up_proj.weight.data = mlp.up_proj.weight.double()


def transpose(mlp):
    mlp.up_proj.weight.data = torch.randn(64, 96).T


def leave_out(mlp):
    mlp.up_proj = None


@pytest.mark.parametrize("change", [quantise, tie, hook, wrap, bias, widen, transpose, leave_out])
def test_what_cannot_be_joined_stays_where_it_is(change):
    model = opened()
    mlp = model.model.layers[1].mlp
    change(mlp)
    before = [parameter.data_ptr() for parameter in mlp.parameters()]
    join(model)
    assert [parameter.data_ptr() for parameter in mlp.parameters()] == before
    assert not list(find_joints(mlp))
    assert len(joints(model)) == 7


def test_without_memory_for_a_group_the_rest_stays_where_it_is(monkeypatch):
    model, cat, calls = opened(), torch.cat, []

    def fails(tensors):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError
        return cat(tensors)

    monkeypatch.setattr(torch, "cat", fails)
    join(model)
    assert len(joints(model)) == 3


def linears(n=3):
    """Layers of one input, joined, and their joint."""
    holder = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj")[:n]:
        setattr(holder, name, nn.Linear(8, 4))
    join(holder)
    return list(holder.children()), next(find_joints(holder))


def test_every_layer_of_a_joint_gives_its_own_output_in_any_order():
    layers, joint = linears()
    x, other = torch.randn(2, 8), torch.randn(2, 8)
    for place, given in ((1, x), (0, other), (2, x), (2, x), (0, x), (0, other), (1, other), (2, other)):
        torch.testing.assert_close(joint.project(place, given), layers[place](given))
    assert not joint.is_unfinished


def test_other_threads_get_a_layers_own_product():
    layers, joint = linears()
    x, given = torch.randn(2, 8), []
    joint.project(0, x)
    thread = threading.Thread(target=lambda: given.extend(joint.project(place, x) for place in (1, 2)))
    thread.start()
    thread.join()
    assert torch.equal(given[0], layers[1](x))
    assert torch.equal(given[1], layers[2](x))
    assert joint.is_unfinished  # nothing of this thread's was taken


def test_who_asks_for_some_of_the_outputs_is_left_apart(monkeypatch):
    """It would read weights for nothing."""
    break_compiler(monkeypatch, lambda function: function)
    model = joined(family_model("llama"))
    glue, attention = Glue(model), model.model.layers[0].self_attn
    for n_replaced in (3, 0):
        with glue.step():
            assert sum("forward" in vars(layer) for layer in attention.children()) == n_replaced
            attention.q_proj(torch.randn(1, 64))
