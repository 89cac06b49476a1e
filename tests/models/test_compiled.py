"""The model's small operations compiled in decode steps: the same results, nothing left behind, and a model that goes
on without where that fails. The tests that compile need a C++ compiler."""

import shutil
import sys
import threading

import pytest
import torch
from families import family_model
from torch import nn
from torch._dynamo.utils import counters

from kvoffload.bench.prompt_kv import PromptKv
from kvoffload.config import RuntimeConfig
from kvoffload.models import compiled
from kvoffload.models.cache import OffloadCache
from kvoffload.models.compiled import Glue, glue_of
from kvoffload.models.feed import feed
from kvoffload.models.joined import join
from kvoffload.models.self_test import switch_attention
from kvoffload.models.step_graph import StepGraph
from kvoffload.models.stock import ResidentStep
from kvoffload.models.tagged import AttendingLayer

compiles = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself

N_STEPS = 3


def open_model(family="llama", dtype=torch.float32):
    model = family_model(family).to(dtype)
    switch_attention(model)
    return model


def run_again(call, generators):
    """A ``Capture`` that runs the step again instead of replaying it."""
    stepped = call()

    def replay():
        again = call()
        stepped.logits.copy_(again.logits)
        stepped.picked.copy_(again.picked)

    return stepped, replay


@torch.inference_mode()
def steps(model, glue, n_sequences=1):
    """Logits of steps of fixed shapes behind a prompt."""
    ids = torch.randint(2, 90, (n_sequences, 140), generator=torch.Generator().manual_seed(1))
    config = RuntimeConfig(sinks=4, recent=8, page_size=4, selector="bounds", completion="anchored", budget="20%")
    with OffloadCache(model.config, config) as cache:
        with cache.prefilling():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        feed(model, cache, ids[:, :1])
        graph = StepGraph(model, cache, run_again, glue=glue)
        given = [graph.step(ids[:, i : i + 1], cache.get_seq_length()).logits.clone() for i in range(N_STEPS)]
        assert graph.refusal == ""
    return torch.stack(given)


def forwards(model):
    """What of a model a glue could change."""
    file = sys.modules[type(model).__module__]
    return [set(vars(module)) for module in model.modules()], file.apply_rotary_pos_emb


def error_of(given, expected):
    return float((given - expected).abs().max() / expected.abs().max())


@compiles
def test_compiled_steps_are_the_models_own():
    """Of joined weights; for other caches and all layers what was compiled once; for several sequences once more."""
    model, other = open_model(), open_model()
    glue, before = Glue(model), forwards(model)
    expected = steps(model, None)
    join(model)
    counters.clear()
    assert error_of(steps(model, glue), expected) < 1e-5
    assert glue.note.startswith("LlamaDecoderLayer, apply_rotary_pos_emb, LlamaRMSNorm in ")
    n_graphs, seconds = counters["stats"]["unique_graphs"], glue.seconds
    assert n_graphs == 4  # before the attention, behind it, rotary, the last norm
    assert seconds > 0
    assert torch.equal(steps(model, glue), steps(model, glue))
    assert (counters["stats"]["unique_graphs"], glue.seconds) == (n_graphs, seconds)
    for n_sequences in (2, 3, 4):
        assert error_of(steps(model, glue, n_sequences), steps(model, None, n_sequences)) < 1e-5
    assert counters["stats"]["unique_graphs"] <= 3 * n_graphs
    assert forwards(model) == before
    assert error_of(steps(other, None), expected) == 0
    assert glue.note.endswith(" s; 8 products of joined weights")


@compiles
def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch):
    """What was compiled is used; other shapes than those run as they are."""
    model = open_model()
    glue, expected = Glue(model), {n: steps(model, None, n) for n in (1, 2)}
    counters.clear()
    for captured, n_sequences, n_graphs in ((True, 1, 0), (False, 1, 4), (True, 1, 4), (True, 2, 4)):
        monkeypatch.setattr(compiled, "_is_captured", lambda captured=captured: captured)
        assert error_of(steps(model, glue, n_sequences), expected[n_sequences]) < 1e-5
        assert counters["stats"]["unique_graphs"] == n_graphs
        assert bool(glue.note) == (n_graphs > 0)


@compiles
def test_experts_stay_outside_and_rounding_stays_the_models():
    """gpt-oss in bf16: attention with sinks, sliding layers and experts."""
    model = open_model("gpt_oss", torch.bfloat16)
    glue, ids = Glue(model), torch.tensor([[5]])
    with torch.inference_mode():
        given = []
        for on in (False, True):
            with OffloadCache(model.config, RuntimeConfig(sinks=4, recent=8, page_size=4)) as cache:
                model(torch.arange(2, 42)[None], past_key_values=cache, use_cache=True)
                with compiled.fused(glue if on else None):
                    given.append(feed(model, cache, ids)[:, -1].float())
    assert error_of(given[1], given[0]) < 0.05
    assert "GptOssDecoderLayer" in glue.note
    assert ";" not in glue.note


@compiles
def test_dense_steps_are_compiled_too():
    model = open_model()
    kv, glue = PromptKv(model, 1, 32), Glue(model)
    given = []
    for chosen in (None, glue):
        step = ResidentStep(model, kv.layers(1, 32), 1, glue=chosen)
        step()
        given.append(step.logits)
    assert error_of(given[1], given[0]) < 1e-5
    assert "LlamaDecoderLayer" in glue.note


def break_compiler(monkeypatch, compile_):
    monkeypatch.setattr(torch, "compile", lambda function, options: compile_(function))


def test_without_a_compiler_the_model_runs_as_it_is(monkeypatch):
    def compile_(function):
        def fails(*args, **kwargs):
            raise RuntimeError("no compiler\nat all")

        return fails

    break_compiler(monkeypatch, compile_)
    model = open_model()
    glue, before = Glue(model), forwards(model)
    assert torch.equal(steps(model, glue), steps(model, None))
    for name in ("LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"):
        assert f"not {name}: no compiler" in glue.note
    assert forwards(model) == before


def test_what_fails_behind_the_attention_does_not_run_it_twice(monkeypatch):
    """Its keys are in the cache already."""
    attended = []

    def compile_(function):
        def fails(layer, *args, **kwargs):
            function(layer, *args, **kwargs)
            raise RuntimeError("late")

        return fails

    break_compiler(monkeypatch, compile_)
    model = open_model()
    of = AttendingLayer.of
    monkeypatch.setattr("kvoffload.models.hf.AttendingLayer.of", lambda key: (attended.append(1), of(key))[1])
    expected, n_calls = steps(model, None), len(attended)
    attended.clear()
    assert torch.equal(steps(model, Glue(model)), expected)
    assert len(attended) == n_calls


def test_wrong_results_are_not_used(monkeypatch):
    def compile_(function):
        def wrong(*args, **kwargs):
            given = function(*args, **kwargs)
            return tuple(2 * t for t in given) if isinstance(given, tuple) else 2 * given

        return wrong

    break_compiler(monkeypatch, compile_)
    model = open_model()
    glue = Glue(model)
    assert torch.equal(steps(model, glue), steps(model, None))
    assert "not LlamaDecoderLayer: its results differ" in glue.note


@compiles
def test_errors_of_the_attention_are_the_callers(monkeypatch):
    model = open_model()
    glue, before = Glue(model), forwards(model)

    def fails(key):
        raise ValueError("damaged page")

    monkeypatch.setattr("kvoffload.models.hf.AttendingLayer.of", fails)
    with torch.inference_mode(), pytest.raises(ValueError, match="damaged page"), glue.step():
        model(torch.tensor([[3]]), use_cache=False)
    assert "not " not in glue.note
    assert forwards(model) == before
    monkeypatch.undo()
    assert error_of(steps(model, glue), steps(model, None)) < 1e-5
    assert "LlamaDecoderLayer" in glue.note


def test_other_threads_run_the_model_as_it_is(monkeypatch):
    called = []
    break_compiler(monkeypatch, lambda function: lambda *a, **k: (called.append(1), function(*a, **k))[1])
    model, ids, given = open_model(), torch.tensor([[3, 4]]), []
    expected = model(ids, use_cache=False).logits
    with Glue(model).step():
        thread = threading.Thread(target=lambda: given.append(model(ids, use_cache=False).logits))
        thread.start()
        thread.join()
    assert torch.equal(given[0], expected)
    assert not called


def test_layers_that_are_wrapped_already_are_left_alone(monkeypatch):
    break_compiler(monkeypatch, lambda function: function)
    model = open_model()
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = own
    with Glue(model).step():
        assert "forward" not in vars(model.model.layers[0])
        assert "forward" in vars(model.model.layers[1])
        assert model.model.layers[0].mlp.forward == own
    assert model.model.layers[0].mlp.forward == own


def test_nothing_is_compiled_on_a_cpu_or_where_it_is_off():
    class OnCuda(nn.Module):
        device = torch.device("cuda")

    model = OnCuda()
    assert glue_of(open_model(), "on") is None
    assert glue_of(model, "off") is None
    assert glue_of(model, "auto") is None
    assert glue_of(model, "on") is glue_of(model, "on") is not None
    assert RuntimeConfig().for_long().compile == "on"
    assert RuntimeConfig(compile="off").for_long().compile == "off"
