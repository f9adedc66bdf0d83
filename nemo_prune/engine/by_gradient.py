"""The search with candidates in the order of benefit over cost, both from a few backward passes.

NeMo takes as candidates what is unusually active, which says nothing about what a neuron does, or costs. Here a
caption's candidates are those whose closed gate lowers its similarity most for what it changes on ordinary captions.
Selection, refinement and the proof at the end are those of the paper's search.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from nemo_prune.engine.attribution import benefits
from nemo_prune.engine.gates import closed_gates
from nemo_prune.engine.localize import Detected, PromptLocalization, detect, not_memorized
from nemo_prune.engine.refinement import refine, refine_in_turn, sweep_by_cost
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.search import SearchResult, search_result
from nemo_prune.engine.selection import Candidates, select, select_in_turn
from nemo_prune.engine.settling import by_value, rank_neurons
from nemo_prune.engine.trials import Limit, Record, Search, Trial, drive
from nemo_prune.engine.views import Seeds, Views
from nemo_prune.mask import Neuron
from nemo_prune.progress import Advance, ignored

# Each candidate set is so much larger than the one before.
_GROWTH = 1.4
# Seeds whose gradients are taken; the search itself asks all that were kept.
_GRADIENT_SEEDS = 4


def localize_by_gradient(
    scorer: Scorer,
    prompts: Sequence[str],
    threshold: float,
    cost_values: Tensor,
    advance: Advance = ignored,
) -> Iterator[PromptLocalization]:
    """Go through a corpus in its order, each prompt on top of the neurons of those before it.

    Args:
        scorer: the model.
        prompts: texts, in the order of the corpus.
        threshold: tau.
        cost_values: what each neuron costs ordinary captions, [neurons]; see :func:`attribution.costs`.
        advance: called with the prompts done and their number.

    Yields:
        One result a prompt, in the order of the corpus; its neurons are those that came on top.
    """
    suppressed: set[Neuron] = set()
    for done, prompt in enumerate(prompts, start=1):
        (detected,) = detect(scorer, [prompt], threshold)
        if not detected.kept_seeds:
            yield not_memorized(detected)
        else:
            passes_before = scorer.sample_passes
            found = _search(scorer, detected, threshold, cost_values, suppressed)
            passes = detected.sample_passes + scorer.sample_passes - passes_before
            if found.status == "localized":
                suppressed.update(found.neurons)
            yield replace(found, sample_passes=passes)
        advance(done, len(prompts))


def search_ranked(ranked: Sequence[Neuron], seeds: Sequence[int], threshold: float) -> Search[SearchResult]:
    """Find the first neurons of a ranking that are enough, then spare what can be spared, the last of it first.

    Args:
        ranked: candidates, the best first.
        seeds: positions of the kept seeds.
        threshold: tau.
    """
    schedule, number = [], 1
    while number < len(ranked):
        schedule.append(Candidates(0.0, 0, tuple(ranked[:number])))
        number = max(number + 1, round(number * _GROWTH))
    schedule.append(Candidates(0.0, 0, tuple(ranked)))
    order: Mapping[Neuron, float] = {neuron: float(place) for place, neuron in enumerate(ranked)}
    record, neurons, fell_back = Record(seeds), None, False
    selection = yield from select(schedule, record, threshold)
    neurons = yield from refine(sweep_by_cost(selection.step.neurons, order), selection, record)
    if neurons is None:
        fell_back = True
        selection = yield from select_in_turn(schedule, record, threshold)
        neurons = yield from refine_in_turn(sweep_by_cost(selection.step.neurons, order), selection.limit, record)
    score = yield from record.score(frozenset(neurons), Limit(threshold, strict=False))
    return search_result(record, selection, neurons, score, fell_back)


def _search(
    scorer: Scorer, detected: Detected, threshold: float, cost_values: Tensor, suppressed: Collection[Neuron]
) -> PromptLocalization:
    predictor, scored = scorer.predictor, detected.scored
    base = frozenset(suppressed)
    result = PromptLocalization(
        prompt=scored.prompt,
        status="localized",
        score=scored.memorization.score,
        kept_seeds=detected.kept_seeds,
        silenced_by_others=True,
        seconds=detected.seconds,
    )

    def answer(trials: list[Trial]) -> list[float]:
        asked = [(scored, trial._replace(neurons=trial.neurons | base)) for trial in trials]
        return scorer.answer(asked, batch_size=1)

    if base and max(answer([Trial(base, seed, threshold) for seed in detected.kept_seeds])) <= threshold:
        return result
    seeds = list(detected.kept_seeds[:_GRADIENT_SEEDS])
    views = Views(
        (scored.prompt,),
        scored.prompt_embeds[None],
        Seeds.of(scored.latents[seeds], predictor.timestep),
        scored.noise_differences[seeds][None],
    )
    closed = 1 - closed_gates(list(base), predictor.sizes)
    benefit = benefits(predictor, views, 0, closed=closed)
    ranks = rank_neurons(benefit.values, cost_values.to(benefit.values.device))
    ranked = [neuron for neuron in by_value(ranks, predictor) if neuron not in base]
    found = drive(search_ranked(ranked, detected.kept_seeds, threshold), answer)
    return replace(
        result,
        status="localized" if found.resolved else "unresolved",
        candidates=found.selected.neurons,
        neurons=found.neurons,
        candidates_score=found.selected_score,
        neurons_score=found.neurons_score,
        fell_back=found.fell_back,
        silenced_by_others=False,
    )
