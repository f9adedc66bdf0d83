"""All stages with the weights on another device than the processor: no tensor is mixed with one that is not there."""

import copy

import pytest
import torch

from elsewhere import DEVICE, Elsewhere, OnTheDevice, pipeline_elsewhere
from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.completing import Copy
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.learned import LearningSettings
from nemo_prune.engine.localize import Localizer, localize_prompts
from nemo_prune.engine.merge import settle_mask, union_mask
from nemo_prune.engine.preserve import neuron_costs
from nemo_prune.engine.pursuit import PursuitSettings, pursue
from nemo_prune.engine.scorer import Scorer
from nemo_prune.mask import Neuron, NeuronMask, Pruning
from nemo_prune.proof.bits import SuppressedPredictions, check_pruned_equals_suppressed
from nemo_prune.proof.cost import noise_change
from nemo_prune.proof.images import draw_images
from nemo_prune.proof.scores import score_under_mask
from nemo_prune.settings import LocalizationSettings, VerificationSettings

SETTINGS = LocalizationSettings(num_samples=2, theta=2.0, theta_min=1.5)
TEXTS = ["a cat", "two dogs"]


@pytest.fixture(scope="module")
def there(pipe):
    return pipeline_elsewhere(pipe)


@pytest.fixture
def on_the_device():
    with OnTheDevice():
        yield


@pytest.fixture(scope="module")
def calibration(pipe):
    return calibrate(Scorer(NoisePredictor(pipe, SETTINGS)), [f"thing number {i}" for i in range(50)])


def localizer_of(pipe, calibration):
    return Localizer(Scorer(NoisePredictor(pipe, SETTINGS)), calibration, 1e-6, refine_unresolved=True)


def test_the_device_refuses_what_is_not_on_it(on_the_device):
    here, away = torch.ones(2), torch.ones(2).to(DEVICE)
    assert away.device == DEVICE and isinstance(torch.zeros(2, device=DEVICE), Elsewhere)
    with pytest.raises(RuntimeError, match="same device"):
        here + away
    assert type(away.cpu()) is torch.Tensor and (away + away).device == DEVICE


@pytest.mark.slow
def test_localization_merge_and_proof_find_what_they_find_on_the_processor(pipe, there, calibration, on_the_device):
    found = {}
    for name, each in (("here", pipe), ("there", there)):
        localizer = localizer_of(each, calibration)
        results = list(localize_prompts(localizer, TEXTS))
        settled = settle_mask(localizer, results)
        mask = settled.mask if settled.mask.num_neurons else union_mask(results, localizer.scorer.predictor.sizes, True)
        fresh = localizer.scorer.predictor.initial_latents(seed=9)
        scores = score_under_mask(localizer, localizer.scorer, results, mask, fresh)
        union = sorted((result.prompt, result.neurons) for result in localize_prompts(localizer, TEXTS))
        found[name] = (mask.neurons, scores, union)
    assert found["here"] == found["there"]
    assert found["here"][2][0][1]


@pytest.mark.slow
def test_a_mask_is_completed_and_learned_as_on_the_processor(pipe, there, on_the_device):
    settings = PursuitSettings(
        more_seeds=2, watched=1, walked=1, points=2, rounds=2, probed=(), probe_seeds=2,
        learning=LearningSettings(steps=2, captions=1, seeds=2, ordinary=2),
    )  # fmt: skip
    found = []
    for each in (pipe, there):
        predictor = NoisePredictor(each, SETTINGS)
        predictor.compensation = Compensation(attended_moments(predictor, TEXTS))
        first = NeuronMask.from_neurons(all_neurons(predictor.sizes)[:1], predictor.sizes)

        looks = []

        def copies(mask, prompts=None, looks=looks):
            # Looked at closely it takes five neurons; at the second look at all it copies again: gates are learned.
            looks += [mask] * (prompts is None)
            copies = mask.num_neurons < 5 if prompts else len(looks) <= 2
            return [Copy(TEXTS[0], TEXTS[0], 1.0)] if copies else []

        rounds = pursue(predictor, TEXTS[:1], ["c", "d"], 0.5, settings, copies, first=first).rounds
        found.append([each.mask.digest for each in rounds])
    assert found[0] == found[1] and len(found[0]) == 3


def test_half_precision_and_its_reference_agree_on_the_device(there, calibration, on_the_device):
    predictor = NoisePredictor(there, SETTINGS)
    scorer = Scorer(predictor, NoisePredictor(there, SETTINGS), margin=2.0)
    localizer = Localizer(scorer, calibration, 1e-6)
    assert list(localize_prompts(localizer, TEXTS[:1])) and scorer.rechecks.made


@pytest.mark.slow
def test_costs_images_and_the_check_of_an_export(pipe, there, on_the_device):
    predictor = NoisePredictor(there, SETTINGS, batch_size=64)
    mask = NeuronMask.from_neurons([Neuron(layer, 0) for layer in predictor.sizes], predictor.sizes)
    assert noise_change(predictor, TEXTS, {"mask": mask})["mask"] > 0
    assert len(neuron_costs(predictor, TEXTS[:1])) == sum(predictor.sizes.values())
    verification = VerificationSettings(images_per_prompt=2, num_inference_steps=2, guidance_scale=3.0)
    assert len(draw_images(there, "a cat", verification)) == 2
    usual = attended_moments(predictor, TEXTS)
    released = NoisePredictor(there, SETTINGS, compensation=Compensation(usual, usual))
    latents, prompt_embeds = released.initial_latents(), released.encode(TEXTS[:1])[0]
    (stood_in,) = released.predict_noise(latents, prompt_embeds, [mask])
    with apply_mask(there, released.in_weights(mask)):
        torch.testing.assert_close(released.predict_noise(latents, prompt_embeds)[0], stood_in, rtol=1e-4, atol=1e-5)
    expected = SuppressedPredictions.of(there, SETTINGS, Pruning(mask), TEXTS[:1])
    assert all(type(each) is torch.Tensor for each in expected.noise_preds)
    pruned = copy.deepcopy(pipe)
    for layer, rows in mask.layers.items():
        pruned.unet.get_submodule(layer).weight.data[rows.nonzero().flatten().tolist()] = 0
    check_pruned_equals_suppressed(expected, pipeline_elsewhere(pruned))
