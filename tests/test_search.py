"""The search on planted and on adversarial scores; on a model that memorizes it is tested in test_demo.py."""

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.oracle import refined
from nemo_prune.engine.search import SearchOptions, search_neurons
from nemo_prune.engine.selection import Candidates
from nemo_prune.engine.trials import drive
from nemo_prune.mask import Neuron

LAYERS = ["down", "up", "mid"]
NEURONS = [Neuron(layer, index) for layer in LAYERS for index in range(4)]
SEEDS = (0, 3, 4, 7)
TAU = 0.4


class Scores:
    """Similarities by a function of set and seed; counts the trials and refuses to make one twice."""

    def __init__(self, similarity):
        self.similarity = similarity
        self.asked = []

    def __call__(self, trials):
        for trial in trials:
            assert trial.neurons and (trial.neurons, trial.seed) not in self.asked
            self.asked.append((trial.neurons, trial.seed))
        return [self.similarity(trial.neurons, trial.seed) for trial in trials]


def schedule_of(order, steps=4):
    """Nested sets: ever more of the order, the last one all of it."""
    ends = [math.ceil(len(order) * step / steps) for step in range(steps + 1)]
    return [Candidates(5 - 0.25 * k, k, tuple(order[:end])) for k, end in enumerate(ends)]


def search(similarity, order=NEURONS, layer_order=LAYERS, options=SearchOptions()):
    scores = Scores(similarity)
    return drive(search_neurons(schedule_of(order), SEEDS, TAU, layer_order, options), scores), scores


def plainly(similarity, order=NEURONS, layer_order=LAYERS):
    """The paper's procedure: every set in turn, every seed, no short cut."""

    def score(neurons):
        if not neurons:
            return math.inf
        values = [similarity(frozenset(neurons), seed) for seed in SEEDS]
        return math.nan if any(map(math.isnan, values)) else max(values)

    for step in schedule_of(order):
        reached = score(step.neurons)
        if reached <= TAU:
            break
    resolved = reached <= TAU
    limit = TAU if resolved else reached
    return step, resolved, tuple(refined(step.neurons, layer_order, limit, score))


def outcome(result):
    return result.selected, result.resolved, result.neurons


def largest_violation(similarities):
    """How much higher, at most, the similarity of a set is than that of a part of it."""
    differences = [
        whole - part
        for (neurons, seed), whole in similarities.items()
        for (others, other_seed), part in similarities.items()
        if seed == other_seed and others < neurons
    ]
    return max((math.inf if math.isnan(each) else each for each in differences), default=0.0)


def test_what_the_proof_at_the_end_sees_decides_the_way_again():
    """The scores are nearly monotone on the way; that they are not shows when nothing more is to be spared."""
    d0, d3, u0, u1, m0, m1 = (NEURONS[place] for place in (0, 3, 4, 5, 8, 9))
    order = [d0, m0, m1, d3, u0, u1, *(each for each in NEURONS if each not in (d0, m0, m1, d3, u0, u1))]
    above_0 = {
        ((d0, m0, m1), 0): 0.4, ((m0, m1), 0): 0.39, ((m0, m1), 7): 0.4, ((d0,), 0): 0.4, ((d0,), 3): 0.7,
        ((d0, m1), 0): 0.39, ((d0, m1), 4): 0.4,
    }  # fmt: skip
    known = {(frozenset(neurons), seed): value for (neurons, seed), value in above_0.items()}
    result, _ = search(lambda neurons, seed: known.get((neurons, seed), 0.0), order)
    assert result.fell_back and result.neurons == (d0, m0)
    assert outcome(result) == plainly(lambda neurons, seed: known.get((neurons, seed), 0.0), order)


weights = st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.2, 0.3, 0.6]), min_size=12, max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(weights, min_size=4, max_size=4), st.permutations(NEURONS), st.permutations(LAYERS))
def test_where_scores_are_monotone_the_search_ends_where_the_paper_does(by_seed, order, layer_order):
    """Each seed's similarity falls by a weight for each suppressed neuron, with many ties."""
    weight = {seed: dict(zip(NEURONS, row, strict=True)) for seed, row in zip(SEEDS, by_seed, strict=True)}

    def similarity(neurons, seed):
        return round(0.95 - sum(weight[seed][neuron] for neuron in neurons), 6)

    result, scores = search(similarity, order, layer_order)
    assert outcome(result) == plainly(similarity, order, layer_order)
    assert not result.fell_back
    assert result.margin == min((abs(similarity(*pair) - TAU) for pair in scores.asked), default=math.inf) or (
        not result.resolved
    )


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False), st.permutations(NEURONS))
def test_whatever_the_scores_the_search_ends_and_says_what_it_can_stand_for(random, order):
    """Scores that follow no rule at all, with ties and NaN.

    A search in turn ends as the paper does, unless scores are further from monotone, on sets that it did not
    ask, than twice what it saw.
    """
    known = {}

    def similarity(neurons, seed):
        return known.setdefault((neurons, seed), random.choice([0.0, 0.2, 0.39, TAU, TAU, 0.41, 0.7, 1.0, math.nan]))

    result, scores = search(similarity, order)
    if result.fell_back:
        seen = largest_violation({pair: known[pair] for pair in scores.asked})
        as_the_paper = outcome(result) == plainly(similarity, order)
        assert as_the_paper or largest_violation(known) > 2 * seen
    elif result.resolved:
        nothing_dropped = set(result.neurons) == set(result.selected.neurons)
        assert nothing_dropped or all(similarity(frozenset(result.neurons), seed) < TAU for seed in SEEDS)
        for neuron in result.neurons:
            smaller = frozenset(result.neurons) - {neuron}
            assert not smaller or any(not known.get((smaller, seed), 0.0) < TAU for seed in SEEDS)


def test_scores_that_are_not_monotone_are_noticed_and_searched_in_turn():
    """One neuron is needed only as long as another one, which is dispensable, is suppressed."""
    needed, disturbing = NEURONS[1], NEURONS[2]

    def similarity(neurons, seed):
        return 0.9 if NEURONS[0] not in neurons or (disturbing in neurons and needed not in neurons) else 0.1

    result, _ = search(similarity)
    assert result.fell_back
    assert outcome(result) == plainly(similarity)


def unlike_the_paper(options, corpora=range(150)):
    """How many searches end elsewhere than the paper does.

    A dispensable neuron raises all seeds, by little, as long as the one that is tested before it acts.
    """
    many = [Neuron(layer, index) for layer in LAYERS for index in range(8)]
    differing = 0
    for number in corpora:
        random = Random(number)
        place = random.randrange(len(many) - 1)
        pair, rise = many[place : place + 2], random.uniform(0.02, 0.16)
        needed = random.sample([each for each in many if each not in pair], 10)
        lowest = {seed: 0.39 - random.uniform(0, 0.15) for seed in SEEDS}

        def similarity(neurons, seed, pair=pair, rise=rise, needed=needed, lowest=lowest):
            value = lowest[seed] + sum(0.05 + seed / 100 for neuron in needed if neuron not in neurons)
            return value + rise * (pair[1] in neurons and pair[0] not in neurons)

        result, _ = search(similarity, many, options=options)
        differing += outcome(result) != plainly(similarity, many)
    return differing


def test_a_search_that_checks_its_way_ends_as_the_paper_does_where_scores_are_not_monotone():
    assert unlike_the_paper(SearchOptions()) > 0
    assert unlike_the_paper(SearchOptions(check_way=True)) == 0


def trials_of_nearly_monotone_searches(options=SearchOptions(), corpora=range(30)):
    """Trials of those searches that fell back, which must end as the paper does.

    Weights add up, with a small error for each set and seed.
    """
    many = [Neuron(layer, index) for layer in LAYERS for index in range(20)]
    trials = []
    for number in corpora:
        random = Random(number)
        weight = {(neuron, seed): random.choice([0.0] * 12 + [0.01, 0.05, 0.3]) for neuron in many for seed in SEEDS}
        known = {}

        def similarity(neurons, seed, known=known, random=random, weight=weight):
            exact = 0.95 - sum(weight[neuron, seed] for neuron in neurons)
            return known.setdefault((neurons, seed), exact + random.uniform(-0.004, 0.004))

        result, scores = search(similarity, many, options=options)
        if result.fell_back:
            trials.append(len(scores.asked))
            assert outcome(result) == plainly(similarity, many), number
    return trials


def test_where_scores_are_nearly_monotone_a_search_in_turn_leaves_out_what_must_be_so():
    with_slack = trials_of_nearly_monotone_searches()
    all_asked = trials_of_nearly_monotone_searches(SearchOptions(slack=math.inf))
    assert len(with_slack) == len(all_asked) >= 5
    assert sum(with_slack) < 0.9 * sum(all_asked)


@settings(deadline=None)
@given(st.sets(st.sampled_from(NEURONS), min_size=1), st.permutations(NEURONS))
def test_exactly_the_planted_neurons_are_found(culprits, order):
    result, _ = search(lambda neurons, seed: 0.1 if culprits <= neurons else 0.9, order)
    assert set(result.neurons) == culprits and result.resolved and not result.fell_back


def test_seeds_that_depend_on_different_neurons_are_all_silenced():
    needed = dict(zip(SEEDS, NEURONS[::3], strict=True))
    result, _ = search(lambda neurons, seed: 0.1 if needed[seed] in neurons else 0.9)
    assert set(result.neurons) == set(NEURONS[::3])


def test_a_prompt_that_nothing_silences_keeps_the_last_set_and_its_score():
    result, _ = search(lambda neurons, seed: 0.9 - 0.01 * len(neurons))
    assert not result.resolved and result.selected.k == 4
    assert result.neurons == tuple(NEURONS) and result.neurons_score == pytest.approx(0.78)


def test_at_the_threshold_a_set_is_selected_but_nothing_is_let_go():
    result, _ = search(lambda neurons, seed: TAU)
    assert result.resolved and result.selected.k == 1
    assert result.neurons == result.selected.neurons


def test_a_few_neurons_among_many_take_few_trials():
    many = [Neuron("down", index) for index in range(400)]
    culprits = {many[7], many[250], many[399]}
    scores = Scores(lambda neurons, seed: 0.1 if culprits <= neurons else 0.9)
    schedule = [Candidates(5.0, 0, tuple(many))]
    result = drive(search_neurons(schedule, SEEDS, TAU, ["down"]), scores)
    assert set(result.neurons) == culprits
    plain = 402 * len(SEEDS)
    assert len(scores.asked) < plain / 30
