"""Looks for copies while a mask is searched: two images of each caption, and more where one copied."""

import pytest
import torch

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.engine.completing import Copy, Round
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.pursuit import Pursuit
from nemo_prune.mask import NeuronMask
from nemo_prune.settings import LocalizationSettings, VerificationSettings
from nemo_prune.stages.pursue import CopyLooks, look_drawing

# Likeness of each caption's images on four seeds to the picture of `a`.
LIKENESSES = {
    "a": [0.2, 0.3, 0.9, 0.9],
    "b": [0.4, 0.47, 0.3, 0.2],
    "c": [0.4, 0.44, 0.3, 0.2],
    "d": [0.46, 0.51, 0.1, 0.1],
    "usual": [0.48, 0.49, 0.9, 0.9],
}


class Planted:
    """The likeness of images that are named by caption and seed."""

    def nearest(self, images):
        values = torch.tensor([LIKENESSES[text][seed] for text, seed in images])
        return values, torch.zeros(len(images), dtype=torch.long)


@pytest.fixture
def looks(pipe, tmp_path, monkeypatch):
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=2))
    memorized, verification = [Prompt(text) for text in "abcd"], VerificationSettings(guidance_scale=3.0)
    found = CopyLooks(predictor, memorized, ["usual"], {}, verification, tmp_path / "looks.jsonl")
    first = found._seeds[0]
    found.__dict__["_references"] = (["a"], Planted())
    found.drawn = []

    def draw(texts, seeds):
        found.drawn += [(text, seed - first) for text in texts for seed in seeds]
        return {text: [(text, seed - first) for seed in seeds] for text in texts}

    monkeypatch.setattr(found, "_draw", draw)
    return found


def test_memorized_captions_must_stay_well_under_the_cut_and_those_that_copied_are_looked_at_on_more_seeds(looks):
    mask = NeuronMask.from_neurons([], looks._predictor.sizes)
    copies = looks(mask)
    # An ordinary caption is under the cut, and need not be far under it.
    assert copies == [Copy("b", "a", 0.5, is_close=True), Copy("d", "a", 1.0)]
    assert sorted(looks.drawn) == [(text, seed) for text in LIKENESSES for seed in range(2)]
    looks.drawn.clear()
    assert looks(mask) == copies and not looks.drawn
    assert looks(mask, ["a"]) == [Copy("a", "a", 0.5)]
    assert looks.drawn == [("a", seed) for seed in range(4)]


@pytest.mark.parametrize(("shown", "looked_at"), [(50, 16), (25, 8), (12, 8), (4, 4), (1, 1)])
def test_looks_take_a_third_of_the_steps_and_never_too_few(shown, looked_at):
    drawing = look_drawing(VerificationSettings(num_inference_steps=shown, guidance_scale=3.0))
    assert drawing.num_inference_steps == looked_at


def test_the_best_round_has_the_fewest_copies_whatever_only_comes_close():
    mask, close = NeuronMask({"mid": torch.tensor([True, False])}), Copy("b", "a", 0.25, is_close=True)
    copies = [(Copy("a", "a", 1.0),), (close, close), (close,), ()]
    pursuit = Pursuit(
        tuple(Round(mask, change, (), (), each, 0) for change, each in zip((1, 2, 4, 7), copies, strict=True))
    )
    assert pursuit.best is pursuit.rounds[3] and pursuit.next_step_costs is None
    assert Pursuit(pursuit.rounds[:3]).best is pursuit.rounds[2]
    other = Pursuit((*pursuit.rounds[1:3], pursuit.rounds[0]))
    assert other.best is pursuit.rounds[2] and other.next_step_costs == 1 - 4
