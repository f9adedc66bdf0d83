"""The search on scores that are planted; on a model that memorizes it is tested in test_demo.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_prune.localize import refine_neurons, select_candidates, select_initial_neurons
from nemo_prune.mask import Neuron
from nemo_prune.settings import LocalizationSettings

LAYERS = ["down", "mid"]
NEURONS = [Neuron(layer, index) for layer in LAYERS for index in range(6)]


def planted(culprits):
    """Similarity falls when all culprits are suppressed; counts the sets it was asked."""
    asked = []

    def score_sets(sets):
        asked.extend(sets)
        return [0.1 if set(culprits) <= set(neurons) else 0.9 for neurons in sets]

    return score_sets, asked


def test_candidates_are_unusual_by_index_then_most_active_and_duplicates_keep_their_last_place():
    activations = {"a": torch.tensor([9.0, 1.0, 8.0, 0.5]), "b": torch.tensor([1.0, 2.0])}
    z_scores = {"a": torch.tensor([6.0, -7.0, 0.0, 5.0]), "b": torch.tensor([0.0, 0.0])}
    assert select_candidates(activations, z_scores, 5.0, 0) == (Neuron("a", 0), Neuron("a", 1))
    assert select_candidates(activations, z_scores, 5.0, 2) == (
        Neuron("a", 1), Neuron("a", 0), Neuron("a", 2), Neuron("b", 1), Neuron("b", 0),
    )  # fmt: skip


def test_the_selection_stops_at_the_first_set_that_is_not_above_the_threshold():
    schedule = []

    def candidates(theta, k):
        schedule.append((theta, k))
        return tuple(NEURONS[: k + 1])

    score_sets, _ = planted([NEURONS[2]])
    selection = select_initial_neurons(candidates, score_sets, 0.4, LocalizationSettings())
    assert schedule == [(5.0, 0), (4.75, 1), (4.5, 2)]
    assert (selection.theta, selection.k, selection.resolved) == (4.5, 2, True)
    assert selection.neurons == tuple(NEURONS[:3])
    at_threshold = select_initial_neurons(candidates, lambda sets: [0.4], 0.4, LocalizationSettings())
    assert at_threshold.resolved


def test_a_selection_that_runs_out_keeps_the_last_set_and_says_so():
    score_sets, asked = planted([Neuron("up", 0)])
    selection = select_initial_neurons(lambda theta, k: tuple(NEURONS), score_sets, 0.4, LocalizationSettings())
    assert (selection.theta, selection.k, selection.resolved) == (1.25, 15, False)
    assert selection.score == 0.9 and len(asked) == 16


def test_nothing_is_asked_about_an_empty_set():
    score_sets, asked = planted(NEURONS)
    select_initial_neurons(lambda theta, k: tuple(NEURONS) if k > 3 else (), score_sets, 0.4, LocalizationSettings())
    assert [len(neurons) for neurons in asked] == [12]


@given(st.sets(st.sampled_from(NEURONS), min_size=1), st.permutations(NEURONS), st.booleans())
def test_refinement_finds_exactly_the_planted_neurons(culprits, order, backwards):
    score_sets, _ = planted(culprits)
    kept = refine_neurons(order, LAYERS[::-1] if backwards else LAYERS, score_sets, 0.4)
    assert set(kept) == culprits
    assert kept == tuple(neuron for neuron in order if neuron in culprits)


def test_layers_are_tried_in_the_given_order_before_single_neurons():
    score_sets, asked = planted([Neuron("down", 1)])
    refine_neurons(NEURONS, ["mid", "down"], score_sets, 0.4)
    assert asked[0] == NEURONS[:6]
    assert [len(neurons) for neurons in asked[1:4]] == [5, 4, 4]


def test_refinement_accepts_only_what_is_strictly_below():
    kept = refine_neurons(NEURONS, LAYERS, lambda sets: [0.4] * len(sets), 0.4)
    assert kept == tuple(NEURONS)


def test_when_any_single_neuron_is_enough_the_last_tested_stays():
    kept = refine_neurons(NEURONS, ["mid", "down"], lambda sets: [0.1] * len(sets), 0.4)
    assert kept == (Neuron("down", 5),)


@pytest.mark.parametrize("layer_order", [LAYERS, LAYERS[::-1]])
def test_within_a_layer_the_order_of_the_candidates_decides(layer_order):
    order = [Neuron("down", 3), Neuron("down", 0)]
    assert refine_neurons(order, layer_order, lambda sets: [0.1] * len(sets), 0.4) == (Neuron("down", 0),)
