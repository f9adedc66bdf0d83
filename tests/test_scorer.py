import copy

import pytest
import torch

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.trials import Trial
from nemo_prune.errors import ModelError
from nemo_prune.mask import Neuron
from nemo_prune.settings import LocalizationSettings

# An even number: a processor's vectors take 32 numbers at once, and a sample of the tiny model has 16 here and there.
# What is left over at the end of a batch would be computed by other instructions. Real models fill their vectors.
SETTINGS = LocalizationSettings(num_samples=4)


@pytest.fixture(scope="module")
def exact(pipe):
    return Scorer(NoisePredictor(pipe, SETTINGS))


@pytest.fixture(scope="module")
def half_pipe(pipe):
    half = copy.deepcopy(pipe)
    half.unet.to(torch.bfloat16)
    return half


@pytest.fixture(scope="module")
def asked(exact):
    """Trials of two prompts, each seed with a set of its own."""
    layers = list(exact.predictor.layers)
    scored = exact.score_prompts(["a cat", "two dogs"])
    sets = [frozenset(Neuron(layer, index) for layer in layers[:n] for index in range(n)) for n in (1, 3, 4)]
    return [(each, Trial(sets[seed], seed, 0.5)) for each in scored for seed in range(3)]


def test_trials_of_many_prompts_are_answered_as_one_by_one_to_the_last_bit(exact, asked):
    together = exact.answer(asked)
    assert together == [exact.answer([each])[0] for each in asked]
    assert max(together) < 1 and len(set(together)) > 3


def test_a_pass_a_trial_and_none_for_what_fills_up_a_batch(exact, asked):
    before = exact.sample_passes
    exact.answer(asked[:1])
    assert exact.sample_passes == before + 1


def test_near_the_threshold_float32_decides(pipe, half_pipe, exact, asked):
    half = NoisePredictor(half_pipe, SETTINGS)
    scored = {each.prompt: each for each in Scorer(half).score_prompts(["a cat", "two dogs"])}
    trials = [(scored[each.prompt], trial) for each, trial in asked]
    alone, careful = Scorer(half), Scorer(half, NoisePredictor(pipe, SETTINGS), margin=2.0)
    rough, precise = alone.answer(trials), careful.answer(trials)
    assert rough != precise
    assert precise == exact.answer(asked)
    assert careful.rechecks.made == len(asked) and alone.rechecks.made == 0
    careless = Scorer(half, NoisePredictor(pipe, SETTINGS), margin=0.0)
    assert careless.answer(trials) == rough and careless.rechecks.made == 0


def test_what_float32_overturns_is_counted(pipe, half_pipe, exact):
    half = NoisePredictor(half_pipe, SETTINGS)
    (scored,) = Scorer(half).score_prompts(["a cat"])
    (exactly,) = exact.score_prompts(["a cat"])
    rough, precise = (float(each.memorization.pairs.max()) for each in (scored, exactly))
    assert rough != precise
    careful = Scorer(half, NoisePredictor(pipe, SETTINGS), margin=2.0)
    between = (rough + precise) / 2
    assert bool(careful.kept_seeds(scored, between)) == (precise > between)
    assert careful.rechecks.overturned >= 1


def test_a_batch_that_memory_does_not_take_is_halved(pipe, monkeypatch):
    predictor = NoisePredictor(pipe, SETTINGS, batch_size=8)
    forward, sizes = pipe.unet.forward, []

    def short_of_memory(sample, *arguments, **options):
        sizes.append(len(sample))
        if len(sample) > most:
            raise torch.OutOfMemoryError("out of memory")
        return forward(sample, *arguments, **options)

    monkeypatch.setattr(pipe.unet, "forward", short_of_memory)
    latents, embeds = predictor.initial_latents(num_samples=5), predictor.encode(["a"]).expand(5, -1, -1)
    most = 2
    halved = predictor.predict_each(latents, embeds, [()] * 5)
    assert sizes == [8, 4, 2, 2, 2] and predictor.batch_size == 2
    monkeypatch.undo()
    torch.testing.assert_close(halved, NoisePredictor(pipe, SETTINGS).predict_each(latents, embeds, [()] * 5))
    monkeypatch.setattr(pipe.unet, "forward", short_of_memory)
    most = 0
    with pytest.raises(ModelError, match="memory"):
        predictor.predict_each(latents, embeds, [()] * 5)
