"""What a sweep's reader is warned of: comparisons that are not made, and budgets that read less than they seem to."""

import pytest

from kvoffload.evaluation.cautions import cautions, small_reads
from kvoffload.evaluation.results import Result
from kvoffload.evaluation.spec import load_spec
from kvoffload.evaluation.summary import make_cell_results


@pytest.fixture
def spec(tmp_path):
    """Pages of 16 behind 16 sinks and 64 recent tokens."""
    (tmp_path / "text.txt").write_text("words")

    def make(**fields):
        given = {"model": "tiny", "task": "kl", "text": [tmp_path / "text.txt"], "contexts": "1024", "budgets": "1%,2%"}
        return load_spec({**given, "methods": "transform/none", "out": tmp_path, **fields}, None)

    return make


def cells(budget, *shares, context=1024):
    """One cell of each read share, by different methods."""
    return make_cell_results(
        [
            Result(
                family="f", key="k", sample="t", model="m", task="kl", context=context, seed=0, commit="c", n=1,
                values={}, heads={}, cost={"read_share": share},
                cell={"method": f"m{i}", "selector": "s", "completion": "c", "budget": budget},
            )
            for i, share in enumerate(shares)
        ],
        [],
    )  # fmt: skip


def test_a_baseline_that_is_not_measured_is_named(spec):
    given = spec()
    assert cautions(given, {"transform/none"}) == [
        "baseline 'bounds/none' is not among the methods: nothing is compared with it"
    ]
    assert cautions(given, {"transform/none", "bounds/none"}) == []


def test_a_baseline_counts_with_the_settings_of_all_methods(spec):
    given = spec(baseline="transform/none", set=["pool=none"])
    assert cautions(given, {method.name for method in given.compared}) == []


@pytest.mark.parametrize("budgets", [{"budgets": "0%,2%"}, {"baseline_budgets": "0%"}])
def test_a_budget_of_nothing_is_told(spec, budgets):
    (told,) = cautions(spec(baseline="transform/none", **budgets), {"transform/none"})
    assert told.startswith("budget 0% reads no page")


@pytest.mark.parametrize(("context", "n_told"), [(80, 1), (95, 1), (96, 0)])
def test_a_context_that_the_anchors_hold_is_told(spec, context, n_told):
    told = cautions(spec(baseline="transform/none", contexts=[context]), {"transform/none"})
    assert len(told) == n_told
    assert all(line.startswith(f"a context of {context} tokens fits into the 16 sinks") for line in told)


def test_a_budget_that_whole_pages_cut_down_is_told(spec):
    assert list(small_reads(spec(), [*cells("1%", 0.0052), *cells("2%", 0.0181)])) == [
        "a budget buys whole pages outside the anchors, so that 1% reads 0.52% at 1,024 tokens"
    ]


def test_a_method_that_reads_little_by_itself_is_no_matter_of_pages(spec):
    assert list(small_reads(spec(), cells("1%", 0.0095, 0.001))) == []


def test_budgets_in_tokens_are_told_and_those_in_bytes_are_not(spec):
    found = [*cells("100", 0.05), *cells("1MiB", 0.001)]
    assert list(small_reads(spec(), found)) == [
        "a budget buys whole pages outside the anchors, so that 100 reads 5.00% at 1,024 tokens"
    ]


def test_nothing_is_told_of_pages_where_none_is_sealed(spec):
    assert list(small_reads(spec(), cells("10%", 0.0, context=80))) == []
