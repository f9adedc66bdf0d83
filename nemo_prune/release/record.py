"""The record of a release: what was done and measured, sealed when it is saved and checked when it is loaded.

No caption is in it. It is read without torch, which takes a second to load.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_prune.errors import RecordError, SettingsError
from nemo_prune.facts import (
    BaseFacts,
    Cost,
    EvidenceFacts,
    ExportReport,
    GoneFacts,
    PromptFacts,
    Rechecks,
    SparedPoint,
    Status,
    StatusCounts,
)
from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.files.untrusted import read_json
from nemo_prune.release.licence import Licence
from nemo_prune.settings import LocalizationSettings, VerificationSettings

if TYPE_CHECKING:
    from nemo_prune.mask import NeuronMask

_SEAL = "seal"


@dataclass(frozen=True)
class MaskRecord:
    """The mask of a release.

    Attributes:
        num_neurons: pruned neurons.
        counts: layer -> pruned neurons.
        sizes: layer -> all neurons.
        scale: what their rows were multiplied by; 0 zeroed them.
        ablation: what they still give: ``zero``; their ``mean`` on ordinary captions, in the biases behind them; or
            ``compensated``: also what kept neurons tell of them, and all are held near their means on memorized
            captions, in the weights behind.
        held: how much memorized captions count in the mean where they are held near means: 1 where all are held alike,
            more where some had to be held harder; None where none is held, and for a finished mask.
        merge: how the prompts' neurons became one mask; None for a finished mask.
        preserve: how much the search favoured ordinary captions; None for a finished mask.
        search: how the neurons were searched; None for a finished mask.
        max_utility_loss: the limit on the change for ordinary captions; None without one.
        made_for: the base that a finished mask was made for.
        forced_on_another_base: whether the base is another one.
        sha256: of the mask's file; None before it is written.
    """

    num_neurons: int
    counts: Mapping[str, int]
    sizes: Mapping[str, int]
    scale: float = 0.0
    ablation: str = "zero"
    held: float | None = None
    merge: str | None = None
    preserve: float | None = None
    search: str | None = None
    max_utility_loss: float | None = None
    made_for: BaseFacts | None = None
    forced_on_another_base: bool = False
    sha256: str | None = None

    @classmethod
    def of(cls, mask: "NeuronMask", **more: object) -> "MaskRecord":
        """The record of a mask, with the other attributes as given."""
        ablation = "compensated" if mask.combinations else "mean" if mask.shifts else "zero"
        return cls(mask.num_neurons, mask.counts, mask.sizes, ablation=ablation, **more)


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
        is_gone: whether nothing of it shows under the mask; None where nobody judged.
    """

    prompt: str
    status: Status
    above_threshold_before: bool
    above_threshold_after: bool
    copies_before: float | None
    copies_after: float | None
    is_gone: bool | None = None


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
        gone: what is gone, and not only silent.
        images: before and after.
        cost: change on ordinary prompts.
        export_verified: whether the exported files predict what the suppressed model does.
        seconds: wall time per stage.
        spared: what a limit on the change for ordinary prompts gives up, the whole mask first; empty without a limit.
        evidence: what the pruned model still gives back and still can do; None where it was not gathered.
    """

    settings: LocalizationSettings
    verification_settings: VerificationSettings
    dtype: str
    float32_rechecks: Rechecks
    calibration: CalibrationFacts
    prompt_results: tuple[PromptResult, ...]
    scores: ScoreFacts
    gone: GoneFacts
    images: ImageFacts
    cost: Cost
    export_verified: bool
    seconds: Mapping[str, float]
    spared: tuple[SparedPoint, ...] = ()
    evidence: EvidenceFacts | None = None


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
        record = from_json(cls, {**others, "measured": measured or None})
        if record.measured and not isinstance(record.prompts, PromptFacts):
            raise ValueError("`prompts` is not what a run found, though `settings` and `scores` are of a run")
        return record

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
