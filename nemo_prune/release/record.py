"""From what a run found to the facts that its card, its report and its record are made of.

No caption is among them. A number that is one prompt's alone is published coarsely or not at all: whoever guesses a
caption and has the base could compute the same number, and would find the caption by it.
"""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import mean, median

from nemo_prune.checkpoint.export import ExportReport
from nemo_prune.corpus.prompts import MOST_PROMPTS_COMPARED, near_duplicates
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.localize import PromptLocalization, count_statuses
from nemo_prune.engine.scorer import Rechecks
from nemo_prune.errors import SettingsError
from nemo_prune.mask import NeuronMask
from nemo_prune.models.demo import DEMO_MODEL
from nemo_prune.models.source import ModelSource
from nemo_prune.proof.images import ImageEvidence
from nemo_prune.proof.scores import PromptVerification
from nemo_prune.release.licence import Licence
from nemo_prune.settings import LocalizationSettings, RunOptions, Statement, VerificationSettings

_PACKAGES = ("nemo-prune", "torch", "diffusers", "transformers", "safetensors", "torchmetrics")
_DECIMALS = 3


def described_base(source: ModelSource, statement: Statement) -> dict:
    """The base of a release for its record, as JSON values.

    Args:
        source: the base.
        statement: may name the Hub id of a local one.

    Returns:
        ``name``, ``repo_id``, ``commit`` and ``variant``; ``model``: what `--model` takes, None for a local folder;
        ``stated_by_publisher``: whether nobody checked that it is this repo's model.

    Raises:
        SettingsError: the publisher names another repo than the base is from.
    """
    base = source.described()
    stated = statement.base_model
    if stated and source.repo_id and stated != source.repo_id:
        raise SettingsError(
            f"The base is {source.repo_id} of the Hub, and --base-model says {stated}. Leave --base-model out."
        )
    model = DEMO_MODEL if source.is_demo else source.repo_id
    is_stated = bool(stated) and not source.repo_id
    named = {"name": stated, "repo_id": stated} if is_stated else {}
    return {**base, **named, "model": model, "stated_by_publisher": is_stated}


@dataclass(frozen=True)
class Findings:
    """All that a run found, with captions; :meth:`facts` leaves them out.

    Attributes:
        localizations: one a prompt, in the order of the corpus.
        verified: the same prompts under the final mask.
        cost: relative change of the noise prediction on ordinary prompts under ``mask``, under as
            many ``random`` neurons, and with ``everything`` suppressed.
        num_duplicates: captions of the corpus that were exactly the same as another one.
        rechecks: scores that float32 decided again, where the precision was lower.
        base: the base model, see :func:`described_base`.
        licence: what is known about the base's.
        references: prompt -> what published files call it.
        evidence: images of some prompts before and after; empty where nothing was pruned.
        exported: what was written; None where nothing was pruned.
    """

    source: ModelSource
    options: RunOptions
    settings: LocalizationSettings
    verification: VerificationSettings
    calibration: Calibration
    threshold: float
    localizations: Sequence[PromptLocalization]
    mask: NeuronMask
    verified: Sequence[PromptVerification]
    cost: dict[str, float]
    rechecks: Rechecks
    num_duplicates: int
    base: Mapping
    licence: Licence
    references: Mapping[str, str]
    evidence: Sequence[ImageEvidence] = ()
    exported: ExportReport = field(default_factory=ExportReport)

    @property
    def memorized(self) -> list[str]:
        """Prompts that were found to be memorized, whether resolved or not."""
        return [each.prompt for each in self.localizations if each.status != "not_memorized"]

    def facts(self, seconds: dict[str, float]) -> dict:
        """The record of the run as JSON values, without any caption or path of the machine.

        Args:
            seconds: wall time per stage.
        """
        memorized = set(self.memorized)
        return {
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            "base": dict(self.base),
            "licence": self.licence.described(),
            "settings": dataclasses.asdict(self.settings),
            "verification_settings": dataclasses.asdict(self.verification),
            "dtype": self.options.model.dtype,
            "float32_rechecks": dataclasses.asdict(self.rechecks),
            "calibration": {
                "threshold": self.threshold,
                "similarity_mean": self.calibration.similarity_mean,
                "similarity_std": self.calibration.similarity_std,
                "num_prompts": self.calibration.statistics.num_prompts,
                "origin": self.calibration.origin,
            },
            "prompts": {
                "total": len(self.localizations),
                "memorized": len(memorized),
                **count_statuses(self.localizations),
                "duplicates": self.num_duplicates,
                "groups": self._groups(),
                "unresolved_included": self.options.include_unresolved,
                "silenced_by_others": sum(each.silenced_by_others for each in self.localizations),
                "not_monotone": sum(each.fell_back for each in self.localizations),
                "smallest_margin": self._smallest_margin(),
                "sample_passes": sum(each.sample_passes for each in self.localizations),
            },
            "prompt_results": self._prompt_results(),
            "mask": {
                "merge": self.options.merge,
                "preserve": self.options.preserve,
                "num_neurons": self.mask.num_neurons,
                "counts": self.mask.counts,
                "sizes": self.mask.sizes,
                "scale": self.options.scale,
            },
            "scores": self._scores([each for each in self.verified if each.prompt in memorized]),
            "images": {
                "per_prompt": self.verification.images_per_prompt,
                "cut": self.verification.replication_cut,
                "memorized": _averages([each for each in self.evidence if each.prompt in memorized]),
                "ordinary": _averages([each for each in self.evidence if each.prompt not in memorized]),
            },
            "cost": self.cost,
            # A run stops with an error where the exported files don't predict what the suppressed model does.
            "export_verified": bool(self.exported.hashes),
            "files": self.exported.described(),
            "seconds": seconds,
        }

    def _smallest_margin(self) -> float | None:
        margins = [each.margin for each in self.localizations if each.margin]
        return float(f"{min(margins):.1g}") if margins else None

    def _prompt_results(self) -> list[dict]:
        """What became of each prompt, in the order of the references, so that the corpus' order is not told.

        Scores and numbers of neurons are left out; see the module.
        """
        evidence = {each.prompt: each for each in self.evidence}
        results = []
        for localization, verified in zip(self.localizations, self.verified, strict=True):
            seen = evidence.get(localization.prompt)
            results.append(
                {
                    "prompt": self.references[localization.prompt],
                    "status": localization.status,
                    "above_threshold_before": verified.score_before > self.threshold,
                    "above_threshold_after": verified.score_after > self.threshold,
                    "copies_before": seen.copies_before if seen else None,
                    "copies_after": seen.copies_after if seen else None,
                }
            )
        return sorted(results, key=lambda result: result["prompt"])

    def _groups(self) -> dict[str, int] | None:
        """The same counts with near-duplicates counted once; None where there are too many to compare."""
        if len(self.localizations) > MOST_PROMPTS_COMPARED:
            return None
        groups = near_duplicates([each.prompt for each in self.localizations])
        statuses = [{self.localizations[position].status for position in group} for group in groups]
        memorized = [group - {"not_memorized"} for group in statuses if group != {"not_memorized"}]
        return {
            "total": len(groups),
            "memorized": len(memorized),
            "localized": sum(group == {"localized"} for group in memorized),
        }

    def _scores(self, memorized: Sequence[PromptVerification]) -> dict:
        before, after = [each.score_before for each in memorized], [each.score_after for each in memorized]
        suppressed = [each.suppressed_similarity for each in memorized]
        return {
            "above_threshold_before": sum(score > self.threshold for score in before),
            "above_threshold_after": sum(score > self.threshold for score in after),
            "suppressed_above_threshold": sum(score > self.threshold for score in suppressed),
            "median_before": _median(before),
            "median_after": _median(after),
            "median_suppressed_similarity": _median(suppressed),
        }


def _averages(evidence: Sequence[ImageEvidence]) -> dict[str, float | None]:
    """Number of prompts, and the mean of every measure over those that have it."""
    averages: dict[str, float | None] = {"num_prompts": len(evidence)}
    for measure in dataclasses.fields(ImageEvidence)[1:]:
        values = [value for each in evidence if (value := getattr(each, measure.name)) is not None]
        average = mean(values) if values else None
        # A share of copies is coarse by itself, and must not become none.
        is_share = measure.name.startswith("copies")
        averages[measure.name] = average if average is None or is_share else round(average, _DECIMALS)
    return averages


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), _DECIMALS) if values else None
