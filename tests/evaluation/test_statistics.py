"""Bootstrap intervals and curves, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from kvoffload.evaluation.statistics import Curve, draws, interval, ratio_of_means, standard_error


def curve(shares, values, *, log_values=True):
    return Curve(np.array(shares), np.array(values), log_values)


def test_an_interval_is_made_of_values_that_were_there():
    assert interval(np.arange(1.0, 101.0), level=0.9) == (5.0, 95.0)


def test_an_interval_keeps_infinities_and_leaves_out_what_is_unknown():
    assert interval(np.array([1.0, np.inf, np.nan, 0.0]), level=0.9) == (0.0, np.inf)
    assert all(math.isnan(end) for end in interval(np.array([np.nan])))


def test_draws_are_those_of_their_seed():
    assert (draws(5, seed=1) == draws(5, seed=1)).all()
    assert (draws(5, seed=1) != draws(5, seed=2)).any()
    assert draws(5, seed=1, times=7).shape == (7, 5)
    assert set(np.unique(draws(3, seed=0))) == {0, 1, 2}


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        values = rng.normal(size=40)
        low, high = interval(values[draws(40, seed=trial, times=400)].mean(-1))
        covered += low <= 0 <= high
    assert 0.88 < covered / 200 < 0.99


def test_the_standard_error_needs_two_values():
    assert standard_error(np.array([1.0])) is None
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)


def test_power_laws_are_interpolated_exactly():
    law = curve([0.01, 0.1], [1.0, 0.01])  # value = 1e-4 / share^2
    assert law.at(0.02) == pytest.approx(0.25)
    assert law.reaches(0.25, lower_is_better=True) == pytest.approx(0.02)


def test_scores_are_linear_in_the_logarithm_of_the_share():
    scores = curve([0.01, 0.1, 0.4], [20.0, 60.0, 80.0], log_values=False)
    assert scores.at(math.sqrt(0.001)) == pytest.approx(40.0)
    assert scores.at(0.2) == pytest.approx(70.0)
    assert scores.reaches(70.0, lower_is_better=False) == pytest.approx(0.2)


def test_nothing_is_extrapolated():
    law = curve([0.01, 0.1], [1.0, 0.01])
    assert math.isnan(law.at(0.2))
    assert math.isnan(law.at(0.005))
    assert law.reaches(0.005, lower_is_better=True) == math.inf
    assert law.reaches(2.0, lower_is_better=True) == 0.0


def test_the_ends_themselves_are_inside():
    law = curve([0.01, 0.1], [1.0, 0.01])
    assert law.at(0.01) == pytest.approx(1.0)
    assert law.at(0.1001) == pytest.approx(0.01)
    assert law.reaches(1.0, lower_is_better=True) == pytest.approx(0.01)
    assert law.reaches(0.01, lower_is_better=True) == pytest.approx(0.1)


def test_a_curve_that_falls_and_rises_counts_where_it_is_good_enough_first():
    bent = curve([0.01, 0.02, 0.04, 0.08], [4.0, 1.0, 2.0, 0.5])
    assert bent.reaches(2.0, lower_is_better=True) == pytest.approx(0.01 * math.sqrt(2))


def test_values_that_have_no_logarithm_are_taken_linearly():
    assert curve([0.01, 0.1], [1.0, 0.0]).at(math.sqrt(0.001)) == pytest.approx(0.5)


def test_a_single_point_is_known_only_there():
    assert curve([0.05], [3.0]).at(0.05) == 3.0
    assert math.isnan(curve([0.05], [3.0]).at(0.06))


def test_all_resampled_curves_are_read_at_once():
    many = curve([0.01, 0.1], [[1.0, 0.01], [4.0, 1.0]])
    np.testing.assert_allclose(many.at(math.sqrt(0.001)), [0.1, 2.0])


def test_the_ratio_is_that_of_the_means_and_unknown_over_nothing():
    ratios = ratio_of_means(np.array([[1.0, 3.0], [1.0, 1.0]]), np.array([[2.0, 6.0], [0.0, 0.0]]))
    assert ratios[0] == 0.5
    assert math.isnan(ratios[1])
