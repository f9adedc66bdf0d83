"""Candidates, and many prompts side by side; the search has tests of its own (test_search.py)."""

import torch

from nemo_prune.engine.localize import select_candidates
from nemo_prune.mask import Neuron


def test_candidates_are_unusual_by_index_then_most_active_and_duplicates_keep_their_last_place():
    activations = {"a": torch.tensor([9.0, 1.0, 8.0, 0.5]), "b": torch.tensor([1.0, 2.0])}
    z_scores = {"a": torch.tensor([6.0, -7.0, 0.0, 5.0]), "b": torch.tensor([0.0, 0.0])}
    assert select_candidates(activations, z_scores, 5.0, 0) == (Neuron("a", 0), Neuron("a", 1))
    assert select_candidates(activations, z_scores, 5.0, 2) == (
        Neuron("a", 1), Neuron("a", 0), Neuron("a", 2), Neuron("b", 1), Neuron("b", 0),
    )  # fmt: skip
