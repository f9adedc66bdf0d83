"""What a run found and measured, as the parts of a record.

A number that is one prompt's alone is published coarsely or not at all: whoever guesses a caption and has the base
could compute the same number, and would find the caption by it.
"""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib import import_module
from statistics import mean, median

from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.corpus.prompts import MOST_PROMPTS_COMPARED, near_duplicates
from nemo_prune.engine.gone import Verdict
from nemo_prune.engine.localize import Localizer, PromptLocalization, count_statuses
from nemo_prune.engine.merge import prompts_per_neuron
from nemo_prune.errors import SettingsError
from nemo_prune.facts import BaseFacts, Cost, EvidenceFacts, GoneFacts, MaskFacts, PromptFacts, SparedPoint
from nemo_prune.files.json_values import to_json
from nemo_prune.mask import Pruning
from nemo_prune.models.source import ModelSource
from nemo_prune.proof.images import ImageEvidence
from nemo_prune.proof.scores import ScoresUnderMask
from nemo_prune.release.record import (
    CalibrationFacts,
    ImageAverages,
    ImageFacts,
    Measured,
    PromptResult,
    Record,
    ScoreFacts,
)
from nemo_prune.settings import Plan, Statement
from nemo_prune.stages.examined import ExaminedPrompt

_PACKAGES = ("nemo-prune", "torch", "diffusers", "transformers", "safetensors", "torchmetrics")
_DECIMALS = 3


def base_facts(source: ModelSource, statement: Statement) -> BaseFacts:
    """The base of a release for its record.

    Args:
        source: the base.
        statement: may name the Hub id of a local one.

    Raises:
        SettingsError: the publisher names another repo than the base is from.
    """
    stated = statement.base_model
    if stated and source.repo_id and stated != source.repo_id:
        raise SettingsError(
            f"The base is {source.repo_id} of the Hub, and --base-model says {stated}. Leave --base-model out."
        )
    if stated and not source.repo_id:
        return dataclasses.replace(source.facts, name=stated, repo_id=stated, stated_by_publisher=True)
    return source.facts


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Package -> version, of what results depend on.

    The packages themselves are asked: a copy that nobody installed has no metadata, and a run must not end by that.
    """
    asked = {name: import_module(name.replace("-", "_")).__version__ for name in packages}
    return {"python": platform.python_version()} | asked


def mask_facts(
    source: ModelSource, record: Record, examined: Sequence[ExaminedPrompt], pruning: Pruning, plan: Plan
) -> MaskFacts:
    """What the file of a run's mask says beside its rows.

    Args:
        source: the base.
        record: of the run.
        examined: the prompts.
        pruning: the mask, and what its rows are multiplied by.
        plan: names the way of merging.
    """
    localizations = [each.localization for each in examined]
    return MaskFacts(
        base=record.base,
        settings=to_json(plan.settings),
        prompts=record.prompts,
        versions=record.versions,
        scale=pruning.scale,
        merge=plan.merge,
        prompts_per_neuron=prompts_per_neuron(localizations, pruning.mask, plan.include_unresolved),
        base_tensors=tensor_digests(source.files, pruning.mask),
    )


def prompt_facts(examined: Sequence[ExaminedPrompt], num_duplicates: int, unresolved_included: bool) -> PromptFacts:
    """What a run found out about its prompts, as counts.

    Args:
        examined: the prompts.
        num_duplicates: captions of the corpus that were exactly the same as another one.
        unresolved_included: whether the sets of unresolved prompts are in the mask.
    """
    localizations = [each.localization for each in examined]
    margins = [each.margin for each in localizations if each.margin]
    return PromptFacts(
        total=len(examined),
        memorized=sum(each.is_memorized for each in examined),
        **count_statuses(localizations),
        duplicates=num_duplicates,
        groups=_groups(localizations),
        unresolved_included=unresolved_included,
        silenced_by_others=sum(each.silenced_by_others for each in localizations),
        not_monotone=sum(each.fell_back for each in localizations),
        smallest_margin=float(f"{min(margins):.1g}") if margins else None,
        sample_passes=sum(each.sample_passes for each in localizations),
        beyond_reach=sum(each.beyond_reach and each.status == "unresolved" for each in localizations),
        with_spare=sum(bool(each.spare) for each in localizations),
    )


def measured_by_a_run(
    plan: Plan,
    localizer: Localizer,
    examined: Sequence[ExaminedPrompt],
    ordinary: Sequence[Verdict],
    ordinary_images: Mapping[str, ImageEvidence],
    cost: Cost,
    is_verified: bool,
    seconds: Mapping[str, float],
    spared: Sequence[SparedPoint] = (),
    evidence: EvidenceFacts | None = None,
) -> Measured:
    """What a run measured, without a caption.

    Args:
        plan: what was to be done.
        localizer: what it was done with.
        examined: the prompts.
        ordinary: verdicts on ordinary prompts.
        ordinary_images: what images of ordinary prompts show.
        cost: change on ordinary prompts.
        is_verified: whether the exported files predict what the suppressed model does.
        seconds: wall time per stage.
        spared: what a limit on the change for ordinary prompts gives up.
        evidence: what the pruned model still gives back and still can do.
    """
    calibration, threshold, verification = localizer.calibration, localizer.threshold, plan.verification
    memorized = [each for each in examined if each.is_memorized]
    return Measured(
        settings=plan.settings,
        verification_settings=verification,
        dtype=plan.model.dtype,
        float32_rechecks=localizer.scorer.rechecks,
        calibration=CalibrationFacts(
            threshold,
            calibration.similarity_mean,
            calibration.similarity_std,
            calibration.statistics.num_prompts,
            calibration.origin,
        ),
        prompt_results=tuple(sorted((_result(each, threshold) for each in examined), key=lambda each: each.prompt)),
        scores=_scores([each.under_mask for each in memorized], threshold),
        gone=_gone(memorized, ordinary, ordinary_images),
        images=ImageFacts(
            verification.images_per_prompt,
            verification.replication_cut,
            _averages([each.images for each in memorized if each.images]),
            _averages(list(ordinary_images.values())),
        ),
        cost=cost,
        export_verified=is_verified,
        seconds=seconds,
        spared=tuple(spared),
        evidence=evidence,
    )


def _gone(
    memorized: Sequence[ExaminedPrompt], ordinary: Sequence[Verdict], images: Mapping[str, ImageEvidence]
) -> GoneFacts:
    """An ordinary prompt is called up by its noise predictions, or by an image that copies and did not before."""
    called_up = {each.prompt for each in ordinary if not each.is_gone}
    called_up |= {text for text, each in images.items() if (each.copies_after or 0) > (each.copies_before or 0)}
    return GoneFacts(
        memorized=len(memorized),
        silent=sum(each.verdict is not None and each.verdict.is_silent for each in memorized),
        gone=sum(each.is_gone for each in memorized),
        ordinary=len({each.prompt for each in ordinary} | images.keys()),
        called_up=len(called_up),
    )


def _result(examined: ExaminedPrompt, threshold: float) -> PromptResult:
    """Scores and numbers of neurons are left out; see the module."""
    images = examined.images
    return PromptResult(
        prompt=examined.reference,
        status=examined.localization.status,
        above_threshold_before=examined.under_mask.score_before > threshold,
        above_threshold_after=examined.under_mask.score_after > threshold,
        copies_before=images.copies_before if images else None,
        copies_after=images.copies_after if images else None,
        is_gone=examined.is_gone if examined.verdict else None,
    )


def _groups(localizations: Sequence[PromptLocalization]) -> dict[str, int] | None:
    """The same counts with near-duplicates counted once; None where there are too many to compare."""
    if len(localizations) > MOST_PROMPTS_COMPARED:
        return None
    groups = near_duplicates([each.prompt for each in localizations])
    statuses = [{localizations[position].status for position in group} for group in groups]
    memorized = [group - {"not_memorized"} for group in statuses if group != {"not_memorized"}]
    return {
        "total": len(groups),
        "memorized": len(memorized),
        "localized": sum(group == {"localized"} for group in memorized),
    }


def _scores(memorized: Sequence[ScoresUnderMask], threshold: float) -> ScoreFacts:
    before, after = [each.score_before for each in memorized], [each.score_after for each in memorized]
    suppressed = [each.suppressed_similarity for each in memorized]
    return ScoreFacts(
        above_threshold_before=sum(score > threshold for score in before),
        above_threshold_after=sum(score > threshold for score in after),
        suppressed_above_threshold=sum(score > threshold for score in suppressed),
        median_before=_median(before),
        median_after=_median(after),
        median_suppressed_similarity=_median(suppressed),
    )


def _averages(evidence: Sequence[ImageEvidence]) -> ImageAverages:
    """The mean of every measure over those prompts that have it."""
    averages = {}
    for measure in dataclasses.fields(ImageEvidence):
        values = [value for each in evidence if (value := getattr(each, measure.name)) is not None]
        average = mean(values) if values else None
        # A share of copies is coarse by itself, and must not become none.
        is_share = measure.name.startswith("copies")
        averages[measure.name] = average if average is None or is_share else round(average, _DECIMALS)
    return ImageAverages(len(evidence), **averages)


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), _DECIMALS) if values else None
