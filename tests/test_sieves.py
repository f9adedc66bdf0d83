"""The sieves: what they measure, and that a caption's value is its own."""

import pytest
import torch

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.errors import SettingsError
from nemo_prune.models.demo import PROMPTS_FILE, TEST_FILE, demo_folder
from nemo_prune.models.known import DEMO
from nemo_prune.models.source import load_pipeline
from nemo_prune.screening.settings import SieveSettings
from nemo_prune.screening.sieves import Sieves, guidance_alignment, guidance_norm
from nemo_prune.settings import LocalizationSettings

CAPTIONS = ["a cat", "a dog", "a rather long caption of a bird", "b"]


@pytest.fixture
def predictor(pipe):
    # An even batch; see test_scorer.py.
    return NoisePredictor(pipe, LocalizationSettings(num_samples=2), batch_size=4)


def test_the_measures_are_their_formulas():
    unconditional = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(guidance_norm(unconditional + 0.5, unconditional), torch.tensor([2.0]))
    assert torch.allclose(guidance_alignment(3 * unconditional, unconditional), torch.tensor([1.0]))
    assert torch.allclose(guidance_alignment(-unconditional, unconditional), torch.tensor([-1.0]))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_value_depends_on_nothing_but_the_caption(predictor, num_samples):
    sieves = Sieves(predictor, SieveSettings(num_samples=num_samples, norm_step=0))
    together = sieves.values(CAPTIONS)
    backwards, alone = sieves.values(CAPTIONS[::-1]), sieves.values(CAPTIONS[2:3])
    for name in ("norm", "anisotropy"):
        assert len(set(together[name])) == len(CAPTIONS)
        assert backwards[name] == together[name][::-1]
        assert alone[name] == together[name][2:3]


def test_the_empty_caption_pulls_nowhere(predictor):
    values = Sieves(predictor, SieveSettings(norm_step=0)).values(["", "a cat"])
    assert values["norm"][0] < 1e-4 < values["norm"][1]


def test_one_or_two_passes_a_caption_and_the_unconditional_halves_once(predictor):
    for sieve, passes in (("norm", 1), ("anisotropy", 2)):
        sieves, before = Sieves(predictor, SieveSettings(sieve, norm_step=0)), predictor.sample_passes
        for _ in range(2):
            sieves.values(CAPTIONS)
        assert predictor.sample_passes - before == passes * (2 * len(CAPTIONS) + 1)


def test_the_steps_are_those_of_the_schedule(predictor, monkeypatch):
    seen = []
    original = predictor.predict_each
    monkeypatch.setattr(
        predictor, "predict_each", lambda *given, timestep: seen.append(timestep) or original(*given, timestep=timestep)
    )
    Sieves(predictor, SieveSettings(norm_step=0)).values(["a"])
    assert set(seen) == {981, 41}
    with pytest.raises(SettingsError, match=r"norm_step.*50 steps"):
        Sieves(predictor, SieveSettings(norm_step=50))


def test_memorized_captions_stand_out_on_the_demo_model_and_ordinary_ones_do_not():
    predictor = NoisePredictor(load_pipeline(demo_folder(), "cpu", torch.float32), LocalizationSettings())
    sieves = Sieves(predictor, SieveSettings(norm_step=DEMO.norm_step))
    memorized, ordinary = (
        sieves.values([prompt.text for prompt in read_prompts(demo_folder() / name)[:5]])
        for name in (PROMPTS_FILE, TEST_FILE)
    )
    for name in sieves.names:
        assert min(memorized[name]) > max(ordinary[name])
