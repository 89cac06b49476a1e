"""Comparisons and tables from made-up samples whose answers are known."""

import json
import math

import pytest

from kvoffload.evaluation.comparison import compare, estimate, over_contexts, worst
from kvoffload.evaluation.entropy import entropy_bins
from kvoffload.evaluation.report import Report
from kvoffload.evaluation.results import Result
from kvoffload.evaluation.summary import make_cell_results, make_rows
from kvoffload.evaluation.tasks.base import Metric

KL, SCORE = Metric("kl", lower_is_better=True), Metric("score", lower_is_better=False)
PPL = Metric("ppl", lower_is_better=True, exponential=True)
SHARES = {"1%": 0.01, "2%": 0.02, "4%": 0.04}
SCALES = (0.5, 1.0, 1.5)  # of three texts


def results(method, values, *, metric="kl", context=100, state=0.0, heads=None):
    """A method's samples: three texts at each budget, with mean ``values``."""
    selector, completion = method.split("/")
    return [
        Result(
            family="f", key=f"{method} {budget}", sample=f"t{i}", model="m", task="kl", context=context, seed=0,
            commit="c", values={metric: value * scale}, n=4, heads=heads or {},
            cell={"method": method, "selector": selector, "completion": completion, "gate": False, "pool": "layer",
                  "budget": budget},
            cost={"read_share": SHARES[budget], "charged_share": SHARES[budget] + state, "index_bytes_per_token": 8.0,
                  "gate_abstains": None},
        )
        for budget, value in values.items()
        for i, scale in enumerate(SCALES)
    ]  # fmt: skip


BASE = results("bounds/none", {"1%": 0.4, "2%": 0.2, "4%": 0.1})  # value = 0.004 / share
OURS = results("quantized/anchored", {"1%": 0.1, "2%": 0.05, "4%": 0.2}, state=0.01)


def cells(*lists):
    return make_cell_results([r for found in lists for r in found], ["bounds/none", "quantized/anchored"])


@pytest.fixture
def compared():
    found = cells(BASE, OURS)
    return [compare(cell, found[:3], KL, seed=0) for cell in found[3:]]


def test_ratios_at_equal_reads_and_at_equal_charge(compared):
    assert compared[0].at_read.value == pytest.approx(0.25)
    assert compared[0].at_charged.value == pytest.approx(0.1 / 0.2)  # charged 2%
    assert compared[1].at_charged.value == pytest.approx(0.05 / (0.004 / 0.03))
    assert math.isnan(compared[2].at_charged.value)  # charged 5%, the baseline ends at 4%


def test_texts_that_scale_together_leave_no_doubt_about_the_ratio(compared):
    low, high = compared[0].at_read.low, compared[0].at_read.high
    assert low == pytest.approx(high)
    assert compared[0].value.low < 0.1 < compared[0].value.high


def test_the_read_ratio_is_at_equal_quality(compared):
    assert compared[0].needed_share == pytest.approx(0.04)
    assert compared[0].read_ratio.value == pytest.approx(0.25)
    assert (compared[1].needed_share, compared[1].read_ratio.value) == (math.inf, 0.0)
    assert compared[2].read_ratio.value == pytest.approx(2.0)


def test_scores_are_compared_by_difference():
    base = results("bounds/none", {"1%": 20.0, "2%": 40.0, "4%": 60.0}, metric="score")
    found = cells(base, results("quantized/anchored", {"1%": 50.0}, metric="score"))
    comparison = compare(found[3], found[:3], SCORE, seed=0)
    assert comparison.at_read.value == pytest.approx(30.0)
    assert comparison.needed_share == pytest.approx(0.02 * math.sqrt(2))


def test_only_common_samples_are_compared():
    found = cells(BASE, [r for r in OURS if r.sample == "t2"])
    assert compare(found[3], found[:3], KL, seed=0).value.value == pytest.approx(0.15)
    assert compare(found[3], [], KL, seed=0) is None


def test_mean_and_worst_over_contexts():
    far = [results("bounds/none", {"1%": 0.4, "2%": 0.2}, context=200)]
    far.append(results("quantized/anchored", {"1%": 0.3}, context=200))
    found = cells(BASE, OURS, *far)
    one = [c for c in found if c.method == "quantized/anchored" and c.budget == "1%"]
    both = [compare(c, [b for b in found if b.is_selection_only and b.context == c.context], KL, seed=0) for c in one]
    assert over_contexts(both, KL).value == pytest.approx((0.1 + 0.3) / (0.4 + 0.4))
    assert worst(both, KL).cell.context == 200


def test_rows_hold_every_field_of_the_file():
    rows = make_rows(cells(BASE, OURS), [KL, SCORE])
    first = json.loads(json.dumps(rows[0].as_dict()))
    needed = {"model", "task", "context", "selector", "completion", "budget", "charged_share", "read_share", "metric",
              "value", "stderr", "n", "seed", "commit"}  # fmt: skip
    assert needed <= set(first)
    assert (first["value"], first["n"], first["samples"], len(rows)) == (pytest.approx(0.4), 12, 3, 6)
    assert first["stderr"] == pytest.approx(0.4 * 0.5 / math.sqrt(3))


def test_perplexity_is_e_to_the_mean():
    (row,) = make_rows(cells(results("bounds/none", {"1%": 2.0}, metric="ppl")), [PPL])
    assert row.value == pytest.approx(math.exp(2.0))
    assert row.stderr == pytest.approx(math.exp(2.0) / math.sqrt(3))


def test_one_text_has_no_interval():
    (cell,) = cells([BASE[0]])
    found = estimate(cell, KL, seed=0)
    assert found.low == found.high == found.value
    assert make_rows([cell], [KL])[0].stderr is None


def test_the_report_says_what_lies_beyond_instead_of_inventing_it():
    text = Report("t", ["n"], cells(BASE, OURS), [KL], "bounds/none", 0).markdown()
    line = next(line for line in text.splitlines() if "| 100 | `quantized/anchored` | 2% |" in line)
    assert "| > 4.00% | < 0.5 |" in line
    assert "beyond" in next(line for line in text.splitlines() if "| 100 | `quantized/anchored` | 4% |" in line)
    assert "against the same selector alone" not in text  # it was not run


def test_entropy_bins_hold_as_many_heads_of_every_cell():
    heads = {"entropy": [1.0, 4.0, 2.0, 3.0], "error": [0.1, 0.1, 0.2, 0.2], "selection_error": [0.1, 0.4, 0.2, 0.6]}
    found = cells(results("quantized/anchored", {"1%": 1.0, "2%": 1.0}, heads=heads))
    low, high = entropy_bins(found, n_bins=2)
    assert (low.low, low.high, high.low, high.high) == (1.0, 2.0, 3.0, 4.0)
    assert (low.n_heads, high.n_heads) == (12, 12)
    assert low.gain == pytest.approx(1.0)
    assert high.gain == pytest.approx(1.0 / 0.3)
    assert low.mass_error is None
