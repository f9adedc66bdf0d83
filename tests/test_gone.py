"""Silent, gone, called up: judged on planted predictions, and on the demo model."""

from dataclasses import replace

import pytest
import torch

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.gone import Corpus, gather_corpus, judge, judge_ordinary, verdict
from nemo_prune.engine.measures import measure, measure_one
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.views import Seeds, Views, most_alike, observe
from nemo_prune.settings import LocalizationSettings

BETAS = (0.33, 0.33, 0.33)
SEEDS = 4


def picture(seed):
    """A smooth picture, 0 to 1, [4, 16, 16]."""
    noise = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size=16, mode="bilinear")[0]


def views_of(*captions):
    """Captions' views; each caption is the pictures of its seeds, or one for all seeds."""
    rows = [torch.stack(each if isinstance(each, list) else [each] * SEEDS) for each in captions]
    seeds = Seeds.of(torch.zeros(SEEDS, 4, 16, 16), 961)
    names = tuple(f"caption {row}" for row in range(len(rows)))
    return Views(names, torch.zeros(len(rows), 2, 2), seeds, torch.stack(rows))


def various(start):
    return [picture(start + seed) for seed in range(SEEDS)]


@pytest.fixture
def corpus():
    """Two memorized captions that draw a picture each; ordinary and emptied ones draw something else every time."""
    memorized, ordinary = views_of(picture(1), picture(2)), views_of(various(100), various(200))
    emptied = views_of(various(300), various(400))
    return Corpus(
        memorized=memorized,
        ordinary=ordinary,
        emptied=measure(emptied, memorized, BETAS),
        usual=measure(replace(ordinary, prompts=("o 0", "o 1")), memorized, BETAS),
        usual_emptied=measure(replace(emptied, prompts=("o 0", "o 1")), memorized, BETAS),
        thresholds=torch.full((SEEDS,), 0.6),
        timestep=961,
        strictness=torch.zeros(2),
        betas=BETAS,
    )


def judged(corpus, *captions):
    measures = measure(views_of(*captions), corpus.memorized, BETAS)
    return [verdict(row, measures, corpus, row) for row in range(len(captions))]


def test_what_draws_something_else_every_time_is_gone(corpus):
    first, second = judged(corpus, various(500), various(600))
    assert first.is_gone and second.is_gone and first.is_silent


def test_what_draws_its_own_picture_is_neither_silent_nor_gone(corpus):
    first, _ = judged(corpus, picture(1), various(600))
    assert not first.is_silent
    assert set(first.reasons) == set(first.margins)


def test_what_draws_another_ones_picture_is_silent_and_not_gone(corpus):
    first, _ = judged(corpus, [*various(500)[:3], picture(2)], various(600))
    assert first.is_silent
    assert first.reasons == ("resembles a memorized caption",)
    assert first.nearest == "caption 1" and first.resemblance == pytest.approx(1)


def test_what_draws_one_new_picture_every_time_is_silent_and_not_gone(corpus):
    first, _ = judged(corpus, picture(9), various(600))
    assert first.is_silent
    assert "its seeds agree" in first.reasons and "resembles a memorized caption" not in first.reasons


def test_seeds_just_under_tau_leave_no_room_to_spare(corpus):
    own = measure(views_of(various(500), various(600)), corpus.memorized, BETAS)
    under = replace(own, own=torch.tensor([[0.59, 0.2, 0.5, 0.3]] * 2))
    far = replace(own, own=torch.tensor([[0.3, 0.2, 0.25, 0.3]] * 2))
    assert verdict(0, under, corpus).is_silent and not verdict(0, under, corpus).is_gone
    assert verdict(0, far, corpus).is_gone


def test_ordinary_captions_are_usual_by_their_highest_seed(corpus):
    """Of captions like those that say what is usual about one in a hundred is over the limit on any of its seeds."""
    generator, over = torch.Generator().manual_seed(0), []
    views = replace(corpus.memorized, seeds=Seeds.of(torch.zeros(20, 1), 961))
    for _ in range(100):
        # Captions are not alike: half of the variance is between them.
        values = 0.3 + 0.07 * (torch.randn(216, 1, generator=generator) + torch.randn(216, 20, generator=generator))
        usual = replace(corpus.usual, resemblance=values[:16])
        limit = replace(corpus, memorized=views, usual=usual).usual_resemblance
        assert limit.shape == (1, 20)
        over.append(float((values[16:] > limit).any(dim=1).float().mean()))
    assert sum(over) / len(over) < 0.015
    # One ordinary caption alone says what is usual without a deviation.
    alone = replace(corpus, memorized=views, usual=replace(corpus.usual, resemblance=values[:1]))
    assert alone.usual_resemblance[0].tolist() == pytest.approx([float(values[0].max())] * 20)


def test_a_stricter_limit_refuses_what_was_gone(corpus):
    strict = replace(corpus, strictness=torch.tensor([0.6, 0.0]))
    first, second = judged(strict, various(500), various(600))
    assert not first.is_gone and second.is_gone


def test_at_another_timestep_no_more_is_asked_than_everything_suppressed_gives(corpus):
    """There even with everything suppressed a prediction may be much like the unsuppressed one."""
    timesteps = torch.tensor([961] * (SEEDS - 2) + [361] * 2)
    later = timesteps == 361
    memorized = replace(corpus.memorized, seeds=replace(corpus.seeds, timesteps=timesteps))
    own = torch.where(later, 0.5, 0.1).expand(2, -1)
    emptied = replace(corpus.emptied, own=own, resemblance=own)
    mixed = replace(
        corpus,
        memorized=memorized,
        emptied=emptied,
        thresholds=torch.where(later, 0.2, 0.6),
        strictness=torch.full((2,), 0.1),
    )
    assert mixed.own_limits[0].tolist() == pytest.approx([0.5] * SEEDS)
    measures = replace(emptied, agreement=torch.zeros(2, SEEDS))
    assert verdict(0, measures, mixed, 0).is_gone and verdict(0, measures, mixed, 0).is_silent
    more = replace(measures, own=own + 0.1 * later)
    assert not verdict(0, more, mixed, 0).is_gone and verdict(0, more, mixed, 0).is_silent
    # At the detection's timestep tau stands, whatever everything suppressed leaves.
    above = replace(mixed, emptied=replace(emptied, own=torch.full((2, SEEDS), 0.7)))
    assert above.own_limits[0].tolist() == pytest.approx([0.6] * (SEEDS - 2) + [0.7] * 2)


def test_everything_suppressed_is_never_worse_than_itself(pipe):
    """The floor is taken from the same predictions, in other batches: the last digits must not decide."""
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=3))
    corpus = gather_corpus(predictor, ["a", "b"], ["c", "d"], Seeds.draw(predictor), 0.9999)
    everything = all_neurons(predictor.sizes)
    assert all(each.margins["resembles a memorized caption"] >= 0 for each in judge(predictor, corpus, everything))
    assert all(each.is_gone for each in judge_ordinary(predictor, corpus, everything))
    assert all(not each.is_silent for each in judge(predictor, corpus, ()))


def test_what_the_detection_predicted_is_not_predicted_again(pipe):
    scorer = Scorer(NoisePredictor(pipe, LocalizationSettings(num_samples=3)))
    predictor, prompts, ordinary = scorer.predictor, ["a", "b"], ["c", "d"]
    detected = scorer.score_prompts(prompts)
    seeds, passes = Seeds.draw(predictor) + Seeds.draw(predictor, 7, 2), []
    found = []
    scored = {each.prompt: each for each in detected}
    for given in (None, lambda texts: [scored[text] for text in texts]):
        before = predictor.sample_passes
        found.append(gather_corpus(predictor, prompts, ordinary, seeds, 0.5, detected=given))
        passes.append(predictor.sample_passes - before)
    assert passes == [2 * 4 * 5, 2 * 4 * 5 - 2 * 3]
    torch.testing.assert_close(found[1].memorized.differences, found[0].memorized.differences)


def test_what_a_corpus_is_judged_against_is_kept_as_it_comes(pipe, tmp_path, monkeypatch):
    predictor, prompts = NoisePredictor(pipe, LocalizationSettings(num_samples=2), batch_size=2), list("abcde")
    seeds, predict = Seeds.draw(predictor), NoisePredictor.predict_each

    def stopped(self, *args, **kwargs):
        # Two captions at a time; the first four are predicted.
        if self.sample_passes == 2 * 4:
            raise KeyboardInterrupt
        return predict(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(NoisePredictor, "predict_each", stopped)
        observe(predictor, prompts, seeds, folder=tmp_path)
    again = observe(predictor, prompts, seeds, folder=tmp_path)
    assert predictor.sample_passes == 2 * 5
    whole = observe(predictor, prompts, seeds)
    assert torch.equal(again.differences, whole.differences) and torch.equal(again.prompt_embeds, whole.prompt_embeds)


def test_the_nearest_of_many_captions_is_among_those_that_are_most_alike():
    many = views_of(*(picture(seed) for seed in range(100)))
    torch.manual_seed(0)
    for number in (0, 40, 99):
        blurred = 0.7 * picture(number) + 0.3 * torch.rand(SEEDS, 4, 16, 16)
        assert most_alike(blurred, many, torch.arange(SEEDS), 3).shape == (3, SEEDS)
        assert most_alike(blurred, many, torch.arange(SEEDS), 1).tolist() == [[number] * SEEDS]
        found = measure_one(number, blurred, many, BETAS)
        assert found.nearest.tolist() == [[number] * SEEDS]
        torch.testing.assert_close(found.resemblance, found.own)


def test_tau_of_another_timestep_comes_from_ordinary_captions(pipe):
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=3))
    seeds = Seeds.draw(predictor) + Seeds.draw(predictor, 7, 3, 501)
    corpus = gather_corpus(predictor, ["a"], ["c", "d"], seeds, 0.4)
    assert corpus.thresholds[:3].tolist() == pytest.approx([0.4] * 3)
    assert len(set(corpus.thresholds[3:].tolist())) == 1 and corpus.thresholds[3] != corpus.thresholds[0]
