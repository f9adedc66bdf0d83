"""A merged mask is settled: who comes back is localized again, nobody is tried twice, nothing is left to spare."""

from dataclasses import replace
from random import Random

import pytest

from benchmarks.simulated import SimulatedPrompt, SimulatedScorer
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_prompts
from nemo_prune.engine.merge import settle_mask
from nemo_prune.engine.preserve import Preserve
from nemo_prune.engine.released_code import RELEASED_CODE_THRESHOLD, SD_V1_LAYERS
from nemo_prune.engine.trials import Why
from nemo_prune.mask import Neuron

LAYERS = list(SD_V1_LAYERS)
A, B, X, Y = (Neuron(LAYERS[0], index) for index in (1, 2, 3, 4))
SEEDS = (0, 3, 7)


def prompt(text, needed, candidates=(), disturbing=(), lowest=0.2, of_everything=0.0):
    """A prompt that its needed neurons silence, on three seeds."""
    return SimulatedPrompt(
        text=text,
        resolved=lowest < RELEASED_CODE_THRESHOLD,
        candidates=(*needed, *candidates),
        needed=tuple(needed),
        seeds=SEEDS,
        weights={seed: dict.fromkeys(needed, 0.4) for seed in SEEDS},
        lowest=dict.fromkeys(SEEDS, lowest),
        disturbing=dict(disturbing),
        of_everything=of_everything,
        step=0,
    )


def localized(localizer, texts):
    """The prompts each for itself, in their order."""
    return sorted(localize_prompts(localizer, texts), key=lambda each: texts.index(each.prompt))


def settled(*corpus):
    scorer = SimulatedScorer(corpus)
    localizer = Localizer(scorer, Calibration(0.358, 0.07, 1.0, scorer.statistics), RELEASED_CODE_THRESHOLD)
    found = localized(localizer, [each.text for each in corpus])
    before = scorer.passes.copy()
    return found, settle_mask(localizer, found), scorer.passes - before


@pytest.fixture
def comes_back():
    """The second one's neuron wakes the first, unless another neuron, that it does not need alone, is suppressed."""
    return prompt("first", [A], [X, Y], {B: (0.5, X)}), prompt("second", [B])


def test_a_prompt_that_comes_back_is_localized_again_on_top(comes_back):
    found, result, _ = settled(*comes_back)
    assert [each.neurons for each in found] == [(A,), (B,)]
    assert result.rounds == 1
    assert set(result.mask.neurons) == {A, B, X}
    first, second = result.localizations
    assert set(first.neurons) == {A, X} and second.neurons == (B,)
    # It counts what was done for it the second time too.
    assert first.sample_passes > found[0].sample_passes and first.status == "localized"


def test_without_what_wakes_it_nobody_comes_back(comes_back):
    _, second = comes_back
    _, result, passes = settled(prompt("first", [A], [X, Y]), second)
    assert result.rounds == 0 and set(result.mask.neurons) == {A, B}
    assert not passes[Why.SELECTION]


def test_what_no_prompt_needs_is_dropped_and_what_one_needs_is_not():
    corpus = [prompt("a", [A], [X]), prompt("b", [B], [Y])]
    scorer = SimulatedScorer(corpus)
    localizer = Localizer(scorer, Calibration(0.358, 0.07, 1.0, scorer.statistics), RELEASED_CODE_THRESHOLD)
    first, second = localized(localizer, ["a", "b"])
    result = settle_mask(localizer, [replace(first, neurons=(X, A)), replace(second, neurons=(Y, B))])
    assert set(result.mask.neurons) == {A, B} and result.num_dropped == 2
    assert settle_mask(localizer, [first, second]).num_dropped == 0


def test_of_what_is_thinned_out_only_that_comes_back_which_a_prompt_needs():
    corpus = [prompt("a", [A], [X]), prompt("b", [B], [Y])]
    scorer = SimulatedScorer(corpus)
    localizer = Localizer(scorer, Calibration(0.358, 0.07, 1.0, scorer.statistics), RELEASED_CODE_THRESHOLD)
    first, second = localized(localizer, ["a", "b"])
    found, asked = [replace(first, neurons=(X, A)), replace(second, neurons=(Y, B))], []

    def thin(neurons, left):
        asked.append(set(neurons))
        return left

    result = settle_mask(localizer, found, thin=lambda neurons: thin(neurons, [Y, B, A]))
    assert asked == [{A, B, X, Y}]
    # Nobody needs Y, but it was not thinned out.
    assert set(result.mask.neurons) == {A, B, Y} and result.num_dropped == 1 and result.rounds == 0
    result = settle_mask(localizer, found, thin=lambda neurons: thin(neurons, [Y, B]))
    assert set(result.mask.neurons) == {A, B, Y} and result.rounds == 1
    assert [each.status for each in result.localizations] == ["localized"] * 2


def test_what_even_everything_does_not_silence_is_named_and_never_tried_again():
    lost, other = prompt("lost", [X], [Y], lowest=0.6), prompt("other", [B])
    found, result, passes = settled(lost, other)
    assert [each.status for each in result.localizations] == ["unresolved", "localized"]
    assert found[0].beyond_reach and not found[0].neurons
    assert result.rounds == 0 and not passes[Why.SELECTION] and not passes[Why.EVERYTHING]


def test_an_unresolved_prompt_is_not_tried_on_top_of_the_mask():
    # Everything together brings it under tau, its candidates do not.
    hard = prompt("hard", [X], [Y], lowest=0.6, of_everything=0.4)
    found, result, passes = settled(hard, prompt("other", [B]))
    assert not found[0].beyond_reach and found[0].status == "unresolved"
    assert result.rounds == 0 and result.localizations[0].status == "unresolved"
    assert not passes[Why.SELECTION] and not passes[Why.EVERYTHING]


class Redundant(SimulatedPrompt):
    """A prompt that is silent where any so many of its neurons are suppressed; half of its seeds ask for one more."""

    def similarity(self, neurons, seed):
        missing = len(self.needed) // 2 + seed % 2 - len(neurons.intersection(self.needed))
        return 0.2 + 0.4 * max(0, missing)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_dropped_at_once_leaves_all_silent_and_none_to_spare(seed):
    random = Random(seed)
    neurons = [Neuron(random.choice(LAYERS), index) for index in range(24)]
    corpus = []
    for number in range(10):
        own = random.sample(neurons, random.randint(4, 9))
        corpus.append(Redundant(**{**vars(prompt(f"p {number}", own)), "seeds": (0, 3, 6)}))
    scorer = SimulatedScorer(corpus, batch_size=8)
    localizer = Localizer(scorer, Calibration(0.358, 0.07, 1.0, scorer.statistics), RELEASED_CODE_THRESHOLD)
    found = [
        PromptLocalization(each.text, "localized", 0.9, each.seeds, neurons=each.needed, candidates=each.needed)
        for each in corpus
    ]
    result = settle_mask(localizer, found)
    kept = frozenset(result.mask.neurons)

    def all_silent(neurons):
        return all(each.similarity(neurons, seed) <= RELEASED_CODE_THRESHOLD for each in corpus for seed in each.seeds)

    assert all_silent(kept) and result.num_dropped > 0
    assert not any(all_silent(kept - {neuron}) for neuron in kept)
    # All seeds of all prompts, once for every neuron: what a sweep one by one would ask.
    assert scorer.passes[Why.DROPPING] < len(neurons) * len(corpus) * 3


def test_of_neurons_that_do_the_same_the_dear_one_is_dropped():
    cheap, dear = A, Neuron(LAYERS[-1], 7)
    corpus = [Redundant(**{**vars(prompt("p", [cheap, dear])), "seeds": (0, 2)})]
    scorer = SimulatedScorer(corpus)
    found = [PromptLocalization("p", "localized", 0.9, (0, 2), neurons=(cheap, dear), candidates=(cheap, dear))]
    for costs, kept in (({cheap: 0.1, dear: 0.9}, cheap), ({cheap: 0.9, dear: 0.1}, dear)):
        localizer = Localizer(
            scorer,
            Calibration(0.358, 0.07, 1.0, scorer.statistics),
            RELEASED_CODE_THRESHOLD,
            preserve=Preserve(costs, 0.0),
        )
        assert settle_mask(localizer, found).mask.neurons == (kept,)
