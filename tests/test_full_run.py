"""The stages of a run at full size, driven by a model of SD v1-4 in the place of the U-Net."""

import json
import subprocess
import sys
from random import Random

import pytest

from benchmarks.full_run import measure
from benchmarks.simulated import read_prompts
from nemo_prune.engine.released_code import SD_V1_LAYERS

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


@pytest.mark.slow
def test_the_benchmark_prints_one_object_and_nothing_else(table):
    command = [sys.executable, "-m", "benchmarks.full_run", "--table", str(table), "--prompts", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert {"sample_passes_computed", "sample_passes_counted", "seconds_python", "seconds_at_10_ms"} <= figures.keys()
    assert set(figures["stages"]) == {"localize", "merge", "score again"}
    assert set(figures["ways"]) == {"thinned", "minimal", "union"}
