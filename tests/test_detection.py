"""The statistics of the screening: known values, coverage, and what can't be known."""

import numpy as np
import pytest

from nemo_prune.screening.detection import auroc, fdr_cut, separation, true_positive_rate, upper_limit

GENERATOR = np.random.default_rng


def test_auroc_counts_pairs_and_ties_half():
    assert auroc(np.array([1.0, 3.0]), np.array([0.0, 1.0, 2.0])).value == pytest.approx((1.5 + 3) / 6)
    same = GENERATOR(0).normal(size=400)
    nothing = auroc(same, same)
    assert nothing.value == pytest.approx(0.5) and nothing.low < 0.47 and nothing.high > 0.53


def test_values_that_do_not_overlap_are_not_taken_for_certainty():
    found = separation(np.arange(17.0) + 100, np.arange(64.0))
    assert found.auroc.value == found.auroc.high == found.tpr.value == found.tpr.high == 1.0
    assert 0.85 < found.auroc.low < 0.99 and 0.8 < found.tpr.low < 0.95
    many = separation(np.arange(1700.0) + 10_000, np.arange(6400.0))
    assert many.auroc.low > 0.998 and many.tpr.low > 0.99


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    true_auroc, true_tpr = 0.9214, 0.3725  # of a normal distribution shifted by 2
    held_auroc = held_tpr = 0
    for seed in range(200):
        generator = GENERATOR(seed)
        memorized, ordinary = generator.normal(2.0, size=60), generator.normal(size=300)
        area, share = auroc(memorized, ordinary), true_positive_rate(memorized, ordinary, seed)
        held_auroc += area.low <= true_auroc <= area.high
        held_tpr += share.low <= true_tpr <= share.high
    assert held_auroc >= 182 and held_tpr >= 178


def test_one_false_alarm_in_a_hundred_is_allowed_and_none_in_less():
    ordinary, memorized = np.arange(100.0), np.array([98.5, 99.5, 50.0])
    assert true_positive_rate(memorized, ordinary).value == pytest.approx(2 / 3)
    assert true_positive_rate(memorized, ordinary[1:]).value == pytest.approx(1 / 3)


def test_clopper_pearsons_limit_is_the_published_one():
    assert upper_limit(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100), rel=1e-4)
    assert upper_limit(5, 20) == pytest.approx(0.4556, abs=1e-4)
    assert upper_limit(7, 7) == 1.0


def test_the_cut_keeps_the_false_discovery_rate():
    shares = []
    for seed in range(100):
        generator = GENERATOR(seed)
        values = np.concatenate([generator.normal(size=1900), generator.normal(5.0, size=100)])
        cut = fdr_cut(values, generator.normal(size=2000), 0.1)
        passed = np.flatnonzero(values >= cut.cut)
        assert len(passed) == cut.num_passed and cut.fdr <= 0.1 < 1 and cut.fdr < cut.fdr_high
        shares.append((passed < 1900).mean())
    assert 0.05 < np.mean(shares) < 0.11


def test_too_few_ordinary_captions_give_no_cut_but_the_number_that_would_do():
    values = np.concatenate([np.linspace(0, 1, 9990), np.full(10, 5.0)])
    few = fdr_cut(values, np.linspace(0, 1, 300), 0.1)
    assert few.cut is None and few.num_passed == 0 and few.fdr is None
    assert few.needed_ordinary == 9999
    enough = fdr_cut(values, np.linspace(0, 1, few.needed_ordinary), 0.1)
    assert enough.cut == 5.0 and enough.num_passed == 10


def test_where_nothing_stands_out_no_number_of_ordinary_captions_helps():
    cut = fdr_cut(np.linspace(0, 1, 500), np.linspace(0, 1, 300), 0.1)
    assert cut.cut is None and cut.needed_ordinary is None
