"""The divergence measurement: nothing at full budget, something at a tiny one, and its arithmetic."""

import pytest
import torch
from divergence import DivergenceTask
from tiny import SMALL
from torch.testing import assert_close

from kvoffload.config import RuntimeConfig


def policy(**fields):
    return RuntimeConfig(**(SMALL | fields))


@pytest.fixture(scope="module")
def task(loaded):
    tokens = torch.randint(0, 256, (260,), generator=torch.Generator().manual_seed(3)).tolist()
    built = DivergenceTask(loaded, tokens, n_steps=20, anchors=policy())
    yield built
    built.close()


@pytest.fixture(scope="module")
def tiny_budget(task):
    return task.measure(policy(budget="3%", selector="uniform", completion="none"))


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_a_full_budget_diverges_nowhere(task, offload):
    found = task.measure(policy(budget="100%", offload=offload, completion="none"))
    assert abs(found.kl) < 1e-5
    assert (found.top1, found.n) == (1.0, 20)
    assert found.read_share > 0.9


def test_a_tiny_budget_diverges(tiny_budget):
    assert tiny_budget.kl > 0.01
    assert 0 < tiny_budget.kl_stderr < tiny_budget.kl
    assert tiny_budget.read_share <= 0.03


def test_the_exact_completion_makes_up_for_a_tiny_budget(task, tiny_budget):
    found = task.measure(policy(budget="3%", selector="uniform", completion="exact"))
    assert abs(found.kl) < 1e-5
    assert found.charged_share > found.read_share


def test_the_same_policy_measures_the_same_twice(task, tiny_budget):
    assert task.measure(policy(budget="3%", selector="uniform", completion="none")).kl == tiny_budget.kl


def test_dense_log_probabilities_are_the_stock_models(task, stock):
    tokens = torch.randint(0, 256, (260,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = stock.model(tokens[None], use_cache=False).logits[0, -20:]
    assert_close(task.dense, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_one_position_is_measured_without_a_warning(loaded):
    tokens = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(3)).tolist()
    task = DivergenceTask(loaded, tokens, n_steps=1, anchors=policy())
    found = task.measure(policy())
    task.close()
    assert found.n == 1
    assert found.kl_stderr == found.kl_stderr  # a number
