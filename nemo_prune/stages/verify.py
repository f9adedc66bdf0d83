"""Gather the evidence on a candidate within a budget: `nemo-prune verify`, and the last stages of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from diffusers import StableDiffusionPipeline

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.errors import PromptError
from nemo_prune.files.work import write_atomically
from nemo_prune.mask import Neuron
from nemo_prune.progress import Listener
from nemo_prune.proof.attack import summarize_attacks, work_ratio
from nemo_prune.proof.drawing import BASE, CANDIDATE, Drawn
from nemo_prune.proof.evidence import (
    Changes,
    Evidence,
    EvidenceSettings,
    EvidenceSummary,
    ModelFacts,
    WorkRatio,
)
from nemo_prune.proof.replication import summarize_replication
from nemo_prune.proof.training_images import TrainingImages, known_training_images
from nemo_prune.stages.verify_bench import Bench
from nemo_prune.stages.verify_returns import (
    measure_attacks,
    measure_captions,
    measure_membership,
    measure_recall,
    measure_tokens,
    measure_variants,
    recall_summary,
)
from nemo_prune.stages.verify_treatments import measure_regrowth, measure_roots
from nemo_prune.stages.verify_utility import measure_utility

EVIDENCE_FILE = "evidence.json"


def gather_evidence(
    base: StableDiffusionPipeline,
    candidate: StableDiffusionPipeline,
    prompts: Sequence[Prompt],
    ordinary: Sequence[str],
    settings: EvidenceSettings,
    folder: Path,
    listener: Listener = Listener(),
    *,
    names: tuple[str, str] = ("the base", "the candidate"),
    neurons: Mapping[str, Sequence[Neuron]] | None = None,
    training: TrainingImages | None = None,
    drawn: Drawn = MappingProxyType({}),
    is_held_out: bool = True,
) -> Evidence:
    """Measure what a candidate still gives back and what it still can do, beside its base.

    The candidate may be any model of the base's architecture. What is measured is kept in the folder, so that a call
    that was stopped goes on where it was; with a larger budget it goes on from there, too.

    Args:
        base: the unpruned model; its weights are given back as they were.
        candidate: the model to judge; the same.
        prompts: captions that the base memorizes.
        ordinary: captions that it does not, held out from calibration.
        settings: what is measured, and how much it may cost.
        folder: where results and images are kept, never for publication.
        listener: hears stages and progress.
        names: what to call the two; never a path.
        neurons: caption -> its own neurons, for the recall matrix.
        training: the training images, where the caller has opened them.
        drawn: images that the caller has drawn in just this way, see :class:`~nemo_prune.proof.drawing.Gallery`.
        is_held_out: whether no calibration saw the ordinary captions; without that, utility is not measured.

    Raises:
        NemoPruneError: the models can't be compared, there are no captions, or the folder can't be used.
    """
    if not prompts or not ordinary:
        raise PromptError("Evidence needs captions that the base memorizes, and ordinary ones that it does not.")
    training = known_training_images(prompts) if training is None else training
    bench = Bench(base, candidate, prompts, ordinary, settings, folder, listener, training, drawn)
    if not is_held_out:
        bench.leave_out("utility", "no ordinary captions were held out from calibration")
    evidence = _gathered(bench, names, neurons or {})
    write_atomically(folder / EVIDENCE_FILE, json.dumps(evidence.to_json(), indent=2))
    return evidence


def _gathered(bench: Bench, names: tuple[str, str], neurons: Mapping[str, Sequence[Neuron]]) -> Evidence:
    """Measure part after part and bring them together."""
    if not neurons or not bench.training.images:
        bench.leave_out("recall", "the prompts' own masks or training images are not known")
    if not bench.training.images:
        bench.leave_out("membership", "no training image is known")
    with bench.counter.counting(bench.base.unet, bench.candidate.unet):
        captions = measure_captions(bench)
        utility, control = measure_utility(bench)
        runs = measure_attacks(bench)
        membership = measure_membership(bench)
        variants = measure_variants(bench)
        roots, refilled = measure_roots(bench)
        regrown = measure_regrowth(bench)
        recall = measure_recall(bench, neurons)
    results = summarize_attacks(runs, bench.settings.attack)
    ratios = {name: work_ratio(results, name) for name in bench.pipes}
    summary = EvidenceSummary(
        base=ModelFacts(names[0], bench.digests[BASE]),
        candidate=ModelFacts(names[1], bench.digests[CANDIDATE]),
        changes=Changes({k: v for k, v in bench.rows.mask.counts.items() if v}, bench.rows.others),
        yardstick=bench.judge.similarity.yardstick,
        drawing=bench.settings.drawing,
        seed=bench.settings.seed,
        images_per_round=bench.settings.images_per_round,
        replication=summarize_replication(
            captions,
            bench.prompts,
            bench.judge.cut,
            control.parts_cut if control else None,
            len(bench.training.not_available),
            bench.settings.most_rounds,
        ),
        control=control,
        utility=utility,
        attacks=tuple(results),
        work_ratios=tuple(WorkRatio(name, *found) for name, found in ratios.items() if found),
        membership=membership,
        variants=tuple(variants),
        roots=roots,
        refilled=tuple(refilled),
        regrown=tuple(regrown),
        tokens=measure_tokens(bench),
        recall=recall_summary(recall, bench.training),
        left_out=bench.left_out,
        budget=bench.budget,
        passes=bench.passes,
        seconds=bench.seconds,
    )
    return Evidence(summary, tuple(captions), tuple(runs), recall, dict(bench.training.not_available))
