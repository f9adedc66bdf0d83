"""Intervals against known values, and samples that are spread."""

from itertools import count

import pytest

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.proof.intervals import Equivalence, GroupedShare, Rate, Spread, upper_bound
from nemo_prune.proof.sampling import duplicate_groups, stratified


def test_exact_intervals_have_the_known_ends():
    none, some = Rate.of(0, 10), Rate.of(3, 10)
    assert none.low == 0 and none.high == pytest.approx(0.3085, abs=1e-4)
    assert (some.low, some.high) == (pytest.approx(0.0667, abs=1e-4), pytest.approx(0.6525, abs=1e-4))
    assert Rate.of(0, 0).share is None and (Rate.of(0, 0).low, Rate.of(0, 0).high) == (0, 1)


def test_the_upper_bound_is_exact_and_wider_for_more_looks():
    assert upper_bound(0, 29) == pytest.approx(1 - 0.05 ** (1 / 29))
    assert upper_bound(0, 29) < 0.1 < upper_bound(0, 28)
    assert upper_bound(0, 29, looks=8) == pytest.approx(1 - (0.05 / 8) ** (1 / 29))
    assert upper_bound(3, 3) == 1


def test_a_spread_is_the_papers_median_and_deviation():
    assert Spread.of([1, 2, 3, 4, 100]) == Spread(3, 1, 5)
    assert Spread.of([]) is None


def test_a_share_by_groups_counts_near_duplicates_once():
    shares = GroupedShare.of({0: [1.0] * 50, 1: [0.0], 2: [0.0], 3: [0.0]})
    assert shares.share == 0.25 and shares.groups == 4 and (shares.any.count, shares.any.total) == (1, 4)
    assert shares.low <= 0.25 <= shares.high and shares.high > 0.4
    nothing = GroupedShare.of({0: [0.0], 1: [0.0]})
    assert nothing.share == nothing.low == 0 and nothing.high == Rate.of(0, 2).high
    assert GroupedShare.of({}) is None


def test_equivalence_holds_within_the_margin_and_not_beyond_or_with_too_few():
    near = [0.001, -0.002, 0.0015, 0.0, -0.001, 0.002]
    assert Equivalence.of("error", near, margin=0.05).holds
    assert not Equivalence.of("error", near, margin=0.0005).holds
    assert not Equivalence.of("error", [value + 0.1 for value in near], margin=0.05).holds
    assert Equivalence.of("error", near[:2], margin=0.05) is None
    assert Equivalence.of("error", [0.0] * 5, 0.01).holds and not Equivalence.of("error", [0.02] * 5, 0.01).holds


def test_any_beginning_is_spread_over_types_and_groups():
    numbers = count()
    prompts = [Prompt(f"a red house in the long street {next(numbers)}", "TM") for _ in range(8)]
    prompts += [Prompt("one lonely cat", "VM"), Prompt("bicycles everywhere", "TM"), Prompt("two grey ships", "VM")]
    assert len(set(duplicate_groups(prompts))) == 4
    order = stratified(prompts)
    assert sorted(order) == list(range(len(prompts))) and stratified(prompts) == order
    assert {prompts[place].kind for place in order[:2]} == {"VM", "TM"}
    assert len({duplicate_groups(prompts)[place] for place in order[:4]}) == 4
