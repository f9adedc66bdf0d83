"""The stages of a run at full size, driven by a model of SD v1-4 in the place of the U-Net."""

import json
import subprocess
import sys
import tracemalloc
from random import Random

import pytest

from benchmarks.full_run import measure
from benchmarks.simulated import SimulatedScorer, read_prompts
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.localize import Localizer, localize_prompts
from nemo_prune.engine.released_code import RELEASED_CODE_THRESHOLD, SD_V1_LAYERS
from nemo_prune.engine.silence import Silence

NUM_PROMPTS = 40
LAYERS = list(SD_V1_LAYERS)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Results like those of the released code: prompts of few and of many candidates, some of them unresolved."""
    random, lines = Random(3), ["Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"]
    for number in range(20):
        unresolved = number % 4 == 3
        per_layer = 20 if unresolved else random.choice([2, 4, 10])
        initial = [random.sample(range(320), per_layer) for _ in LAYERS]
        # Hubs that many prompts need, and something of their own.
        initial[0] = list(dict.fromkeys([*initial[0], 221, 25]))
        refined = [[random.choice([221, 25])], *([random.choice(each)] for each in initial[1:3]), [], [], [], []]
        low, high = (0.5, 0.6) if unresolved else (0.3, 0.427)
        after = random.uniform(low, high)
        lines.append(f"caption {number};x;{initial};{after if unresolved else min(after, 0.427)};{refined};{after}")
    path = tmp_path_factory.mktemp("table") / "results.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(table):
    return read_prompts(table, NUM_PROMPTS)


@pytest.fixture(scope="module")
def ways(corpus):
    return {merge: measure(corpus, merge, batch_size=40) for merge in ("thinned", "minimal", "union")}


def test_prompts_end_as_the_released_codes_procedure_does(ways):
    assert ways["union"]["as_the_released_code"] == {"agreeing": NUM_PROMPTS, "of": NUM_PROMPTS}
    statuses = ways["union"]["statuses"]
    assert statuses["localized"] > statuses["unresolved"] > 0


def test_every_pass_has_a_reason_and_a_stage(ways):
    for figures in ways.values():
        assert sum(figures["passes_for"].values()) == figures["sample_passes_counted"]
        for kind in ("counted", "computed"):
            of_stages = sum(stage[f"sample_passes_{kind}"] for stage in figures["stages"].values())
            assert of_stages == figures[f"sample_passes_{kind}"]
        assert figures["sample_passes_computed"] == 40 * figures["calls"]


def test_an_unresolved_prompt_costs_its_selection_alone(corpus):
    unresolved = [prompt for prompt in corpus if not prompt.resolved]
    figures = measure(unresolved, "union", batch_size=40)
    assert figures["statuses"]["unresolved"] == len(unresolved) and figures["neurons"] == 0
    # Ten seeds, everything suppressed, sixteen sets, and the fresh latents with the mask and without.
    assert figures["stages"]["localize"]["sample_passes_counted"] <= (10 + 1 + 16 + 5) * len(unresolved)


def test_the_minimal_merge_silences_what_it_resolves_and_the_union_less(ways):
    minimal, union = ways["minimal"], ways["union"]
    assert minimal["silent"] == minimal["statuses"]["localized"] >= union["statuses"]["localized"]
    # What one prompt needs wakes another where scores are not monotone.
    assert 0 < union["silent"] < minimal["silent"]


def test_what_thinning_wakes_is_silenced_again(ways):
    thinned = ways["thinned"]
    assert thinned["silent"] == thinned["statuses"]["localized"] == ways["minimal"]["silent"]
    assert thinned["neurons"] >= ways["minimal"]["neurons"]


@pytest.fixture
def localizer(corpus):
    scorer = SimulatedScorer(corpus)
    return Localizer(scorer, Calibration(0.358, 0.07, 1.0, scorer.statistics), RELEASED_CODE_THRESHOLD)


@pytest.fixture
def large_mask(localizer, corpus):
    """Nearly all neurons, none that a prompt needs."""
    return localizer.everything.difference(*(each.candidates for each in corpus))


def most_traced(do):
    """The most memory in MB that Python takes while something is done."""
    tracemalloc.start()
    try:
        do()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_a_search_on_top_of_a_large_mask_does_not_keep_it_in_every_set(localizer, corpus, large_mask):
    texts, sizes = [each.text for each in corpus], []

    def seen(asked, batch_size=None, answer=localizer.scorer.answer):
        sizes.extend(len(trial.neurons) for _, trial in asked)
        return answer(asked)

    localizer.scorer.answer = seen
    alone = most_traced(lambda: list(localize_prompts(localizer, texts)))
    assert min(sizes) < 100
    sizes.clear()
    on_top = most_traced(lambda: list(localize_prompts(localizer, texts, large_mask)))
    # It is suppressed in all that is asked, and a set of it has half a megabyte.
    assert min(sizes) > len(large_mask) > 2000
    assert max(alone, on_top) < 25


def test_what_is_known_of_silent_prompts_is_small(localizer, corpus, large_mask):
    silence = Silence(localizer, {each.text: each.seeds for each in corpus})
    assert most_traced(lambda: silence.awake(list(silence.prompts), set(large_mask))) < 4


@pytest.mark.slow
def test_the_benchmark_prints_one_object_and_nothing_else(table):
    command = [sys.executable, "-m", "benchmarks.full_run", "--table", str(table), "--prompts", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert {"sample_passes_computed", "sample_passes_counted", "seconds_python", "seconds_at_10_ms"} <= figures.keys()
    assert set(figures["stages"]) == {"localize", "merge", "score again"}
    assert set(figures["ways"]) == {"thinned", "minimal", "union"}
