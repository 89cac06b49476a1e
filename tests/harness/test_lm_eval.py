"""lm-eval's model ``kvoffload``: what lm-eval's own model gives at a full budget, and what it refuses."""

from importlib.util import find_spec

import pytest

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval, the extra [eval], is not installed", allow_module_level=True)

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.harness.model import KvoffloadLM
from kvoffload.runtime.engine import Runtime

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "self_test": False}
TASKS = ["kvo_choice", "kvo_text", "kvo_whole"]


@pytest.fixture(scope="module")
def evaluate(task_folder):
    """Results and samples of one task of every kind."""

    def run(model):
        known = TaskManager(include_path=str(task_folder), include_defaults=False)
        return simple_evaluate(model, tasks=TASKS, task_manager=known, bootstrap_iters=0, batch_size=1)

    return run


@pytest.fixture
def ours(loaded):
    def build(**fields):
        loaded.tokenizer.eos_token = "<pad>"  # lm-eval's own model needs one
        options = {name: fields.pop(name) for name in ("max_length", "batch_size") if name in fields}
        return KvoffloadLM(runtime=Runtime(loaded, RuntimeConfig(**(SMALL | fields))), **options)

    return build


def answers(results):
    """By task and sample, what the model said."""
    return {name: [sample["filtered_resps"] for sample in results["samples"][name]] for name in TASKS}


def flat(values):
    for value in values:
        yield from flat(value) if isinstance(value, list | tuple) else [value]


def test_a_full_budget_gives_what_lm_evals_own_model_gives(ours, stock, evaluate):
    stock.tokenizer.eos_token = "<pad>"
    theirs = HFLM(pretrained=stock.model, tokenizer=stock.tokenizer, batch_size=1, max_length=120)
    expected, given = evaluate(theirs), evaluate(ours(budget="100%", max_length=120))
    for name in TASKS:
        a, b = ([*flat(answers(results)[name])] for results in (expected, given))
        assert b == pytest.approx(a, abs=2e-3) if isinstance(a[0], float) else b == a
        scores = [{k: v for k, v in results["results"][name].items() if "," in k} for results in (expected, given)]
        assert scores[1].keys() == scores[0].keys()
    assert any(answer for answer in answers(given)["kvo_text"])


def test_a_small_budget_is_kept_and_told(ours, evaluate):
    results = evaluate(ours(budget="10%", completion="none"))
    told = results["config"]
    assert 0 < told["read_share"] <= 0.11
    assert told["runtime"]["budget"] == "10%"


def test_the_model_is_registered_and_made_from_arguments():
    model = get_model("kvoffload").create_from_arg_string("pretrained=tiny,budget=7%,page_size=4", {"batch_size": 2})
    assert (str(model.runtime.config.budget), model.batch_size) == ("7%", 2)
    with pytest.raises(UsageError, match="budgett: unknown name"):
        get_model("kvoffload").create_from_arg_string("pretrained=tiny,budgett=7%")
    with pytest.raises(UsageError, match="either pretrained or runtime"):
        KvoffloadLM()


def test_prompts_are_cut_to_their_newest_tokens(ours):
    model = ours(max_length=50)
    assert model._question([*range(100)], [1, 2]).context == tuple(range(51, 100))
    with pytest.raises(UsageError, match="51 tokens is longer than 50"):
        model._question([1], [0] * 51)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"typical_p": 0.9}, {"repetition_penalty": 1.2}])
def test_generations_that_are_not_followed_are_refused_by_name(ours, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        ours()._generate("a prompt", options)


def test_a_missing_chat_template_is_refused(ours):
    with pytest.raises(UsageError, match="'tiny' has no chat template"):
        ours().apply_chat_template([{"role": "user", "content": "a"}])
