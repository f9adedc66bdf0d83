"""The record of a release: what was done and measured, sealed when it is saved and checked when it is loaded.

No caption is in it. A number that is one prompt's alone is published coarsely or not at all: whoever guesses a
caption and has the base could compute the same number, and would find the caption by it.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

from nemo_prune.checkpoint.export import ExportReport
from nemo_prune.corpus.prompts import MOST_PROMPTS_COMPARED, near_duplicates
from nemo_prune.engine.localize import Localizer, PromptLocalization, Status, count_statuses
from nemo_prune.engine.scorer import Rechecks
from nemo_prune.errors import RecordError, SettingsError
from nemo_prune.facts import BaseFacts, PromptFacts, StatusCounts
from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.files.untrusted import read_json
from nemo_prune.mask import NeuronMask
from nemo_prune.models.source import ModelSource
from nemo_prune.proof.cost import Cost
from nemo_prune.proof.images import ImageEvidence
from nemo_prune.proof.scores import ScoresUnderMask
from nemo_prune.release.licence import Licence
from nemo_prune.settings import LocalizationSettings, Plan, Statement, VerificationSettings
from nemo_prune.stages.examined import ExaminedPrompt

_PACKAGES = ("nemo-prune", "torch", "diffusers", "transformers", "safetensors", "torchmetrics")
_DECIMALS = 3
_SEAL = "seal"


@dataclass(frozen=True)
class MaskRecord:
    """The mask of a release.

    Attributes:
        num_neurons: pruned neurons.
        counts: layer -> pruned neurons.
        sizes: layer -> all neurons.
        scale: what their rows were multiplied by; 0 zeroed them.
        merge: how the prompts' neurons became one mask; None for a finished mask.
        preserve: how much the search favoured ordinary captions; None for a finished mask.
        made_for: the base that a finished mask was made for.
        forced_on_another_base: whether the base is another one.
        sha256: of the mask's file; None before it is written.
    """

    num_neurons: int
    counts: Mapping[str, int]
    sizes: Mapping[str, int]
    scale: float = 0.0
    merge: str | None = None
    preserve: float | None = None
    made_for: BaseFacts | None = None
    forced_on_another_base: bool = False
    sha256: str | None = None

    @classmethod
    def of(cls, mask: NeuronMask, **more: object) -> "MaskRecord":
        """The record of a mask, with the other attributes as given."""
        return cls(mask.num_neurons, mask.counts, mask.sizes, **more)


@dataclass(frozen=True)
class CalibrationFacts:
    """What was usual: the attributes are those of :class:`~nemo_prune.engine.calibration.Calibration`."""

    threshold: float
    similarity_mean: float
    similarity_std: float
    num_prompts: int
    origin: str


@dataclass(frozen=True)
class PromptResult:
    """What became of one prompt, which only the work folder can look up.

    Attributes:
        prompt: its reference, a keyed hash.
        status: of its localization.
        above_threshold_before: whether its memorization score on fresh seeds is above the threshold.
        above_threshold_after: the same under the mask.
        copies_before: share of its images that copy a training image; None where none were compared.
        copies_after: the same after pruning.
    """

    prompt: str
    status: Status
    above_threshold_before: bool
    above_threshold_after: bool
    copies_before: float | None
    copies_after: float | None


@dataclass(frozen=True)
class ScoreFacts:
    """Scores of the memorized prompts.

    Attributes:
        above_threshold_before: prompts whose memorization score on fresh seeds is above the threshold.
        above_threshold_after: the same under the mask.
        suppressed_above_threshold: prompts whose suppressed similarity on a kept seed is above it under the mask.
        median_before: median of the memorization scores on fresh seeds; None without a memorized prompt.
        median_after: the same under the mask.
        median_suppressed_similarity: median of the suppressed similarities.
    """

    above_threshold_before: int
    above_threshold_after: int
    suppressed_above_threshold: int
    median_before: float | None
    median_after: float | None
    median_suppressed_similarity: float | None


@dataclass(frozen=True)
class ImageAverages:
    """Number of prompts, and the mean of each measure of :class:`~nemo_prune.proof.images.ImageEvidence`."""

    num_prompts: int
    copies_before: float | None = None
    copies_after: float | None = None
    nearest_before: float | None = None
    nearest_after: float | None = None
    to_unpruned: float | None = None
    between_seeds_before: float | None = None
    between_seeds_after: float | None = None


@dataclass(frozen=True)
class ImageFacts:
    """What the images show.

    Attributes:
        per_prompt: images per prompt, before and after.
        cut: similarity from which an image counts as a copy.
        memorized: averages over the memorized prompts that images were drawn for.
        ordinary: the same over ordinary prompts.
    """

    per_prompt: int
    cut: float
    memorized: ImageAverages
    ordinary: ImageAverages


@dataclass(frozen=True)
class Measured:
    """What a run measured, and with which numbers.

    Attributes:
        settings: the numbers of the method.
        verification_settings: of the images and fresh scores.
        dtype: precision of the weights.
        float32_rechecks: similarities that float32 decided.
        calibration: what was usual.
        prompt_results: one per prompt, in the order of the references, which does not tell that of the corpus.
        scores: of the memorized prompts.
        images: before and after.
        cost: change on ordinary prompts.
        export_verified: whether the exported files predict what the suppressed model does.
        seconds: wall time per stage.
    """

    settings: LocalizationSettings
    verification_settings: VerificationSettings
    dtype: str
    float32_rechecks: Rechecks
    calibration: CalibrationFacts
    prompt_results: tuple[PromptResult, ...]
    scores: ScoreFacts
    images: ImageFacts
    cost: Cost
    export_verified: bool
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Record:
    """The record of a release.

    Attributes:
        versions: package -> version.
        base: the unpruned model.
        licence: what is known about its licence.
        mask: what was pruned.
        prompts: what was examined; None where a finished mask does not say it.
        files: what was written.
        measured: what a run measured; None for a release that was made from a finished mask.
    """

    versions: Mapping[str, str]
    base: BaseFacts
    licence: Licence
    mask: MaskRecord
    prompts: PromptFacts | StatusCounts | None
    files: ExportReport
    measured: Measured | None = None

    def to_json(self) -> dict:
        """JSON values, what was measured beside the rest."""
        values = to_json(self)
        return {**{name: values[name] for name in values if name != "measured"}, **(values["measured"] or {})}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Record":
        """What :meth:`to_json` made.

        Raises:
            ValueError, SettingsError: it is not such a record.
        """
        names = {field.name for field in dataclasses.fields(Measured)}
        measured = {name: value for name, value in values.items() if name in names}
        others = {name: value for name, value in values.items() if name not in names}
        return from_json(cls, {**others, "measured": measured or None})

    def save(self, path: Path) -> None:
        """Write the record with a seal over everything in it.

        The seal detects accidental edits; anyone can recompute it.
        """
        values = self.to_json()
        path.write_text(json.dumps({**values, _SEAL: _seal(values)}, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Read a record that :meth:`save` wrote, and check its seal.

        Raises:
            RecordError: there is none, it is damaged, or it was changed since.
        """
        try:
            values = read_json(path)
            if not isinstance(values, dict):
                raise ValueError("it is not a JSON object")
            seal = values.pop(_SEAL, None)
            record = cls.from_json(values)
        except FileNotFoundError as error:
            raise RecordError(
                f"There is no {path.name} in {path.parent}. Give a folder that nemo-prune wrote."
            ) from error
        except (ValueError, OSError, SettingsError) as error:
            raise RecordError(
                f"{path.name} is not a record of nemo-prune, or one of another version: {error}. Export the model "
                "again."
            ) from error
        if seal != _seal(values):
            raise RecordError(f"{path.name} was changed after the export. Export the model again.")
        return record


def _seal(values: Mapping) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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


def versions() -> dict[str, str]:
    """Package -> version, of what results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


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
    ordinary_images: Sequence[ImageEvidence],
    cost: Cost,
    is_verified: bool,
    seconds: Mapping[str, float],
) -> Measured:
    """What a run measured, without a caption.

    Args:
        plan: what was to be done.
        localizer: what it was done with.
        examined: the prompts.
        ordinary_images: what images of ordinary prompts show.
        cost: change on ordinary prompts.
        is_verified: whether the exported files predict what the suppressed model does.
        seconds: wall time per stage.
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
        images=ImageFacts(
            verification.images_per_prompt,
            verification.replication_cut,
            _averages([each.images for each in memorized if each.images]),
            _averages(ordinary_images),
        ),
        cost=cost,
        export_verified=is_verified,
        seconds=seconds,
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
