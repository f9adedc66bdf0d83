"""Records as a run writes them, for the tests of what is made from them."""

from dataclasses import replace

from nemo_prune.engine.released_code import SD_V1_LAYERS
from nemo_prune.facts import BaseFacts, Cost, ExportReport, GoneFacts, PromptFacts, Rechecks
from nemo_prune.release.licence import Licence
from nemo_prune.release.record import (
    CalibrationFacts,
    ImageAverages,
    ImageFacts,
    MaskRecord,
    Measured,
    PromptResult,
    Record,
    ScoreFacts,
)
from nemo_prune.settings import LocalizationSettings, VerificationSettings

COMMIT = "c0ffee" + "0" * 34
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_NAME = "CompVis/stable-diffusion-v1-4"


def run_record(**changes: object) -> Record:
    """The record of a run on SD v1-4 that left nothing behind, with changes as :func:`changed` takes them."""
    memorized = ImageAverages(8, 1.0, 0.0, 0.76, 0.31, 0.3, 0.8, 0.2)
    measured = Measured(
        settings=LocalizationSettings(),
        verification_settings=VerificationSettings(guidance_scale=7.0),
        dtype="float32",
        float32_rechecks=Rechecks(),
        calibration=CalibrationFacts(0.428, 0.358, 0.07, 500, "measured"),
        prompt_results=(PromptResult("0" * 64, "localized", True, False, 1.0, 0.0),),
        scores=ScoreFacts(8, 1, 0, 0.7, 0.3, 0.4),
        gone=GoneFacts(8, 8, 8, 16, 0),
        images=ImageFacts(4, 0.5, memorized, ImageAverages(0)),
        cost=Cost(0.03, 0.05, 0.6),
        export_verified=True,
        seconds={"load": 1.5},
    )
    record = Record(
        versions={"nemo-prune": "0.1.0"},
        base=BaseFacts(_NAME, _NAME, COMMIT, model=_NAME),
        licence=Licence({"license": "creativeml-openrail-m"}, "base"),
        mask=MaskRecord(21, dict.fromkeys(SD_V1_LAYERS, 3), SD_V1_LAYERS, merge="minimal", preserve=0.0),
        prompts=PromptFacts(
            total=9, memorized=8, localized=8, not_memorized=1, unresolved=0, unresolved_included=False, duplicates=0,
            groups=None, silenced_by_others=0, not_monotone=0, smallest_margin=0.001, sample_passes=900,
        ),
        files=ExportReport(
            sha256={"model_index.json": "0" * 64, WEIGHTS: "ab" * 32},
            rows_changed={WEIGHTS: 21},
            left_out={"unet/a.bin": "not safetensors"},
        ),
        measured=measured,
    )  # fmt: skip
    return changed(record, **changes)


def changed(record: Record, **changes: object) -> Record:
    """A record with changes.

    Args:
        record: to start from.
        changes: an attribute of the record, or of what was measured -> its new value, or a dictionary of those of its
            attributes that change.
    """
    for name, change in changes.items():
        owner = record if hasattr(record, name) else record.measured
        old = getattr(owner, name)
        new = replace(owner, **{name: replace(old, **change) if isinstance(change, dict) else change})
        record = new if owner is record else replace(record, measured=new)
    return record
