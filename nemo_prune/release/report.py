"""The report of a run: every caption and image, for the work folder and never for publication."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_prune.files.json_values import to_json
from nemo_prune.files.work import write_atomically
from nemo_prune.proof.images import save_grid
from nemo_prune.release.markdown import code, number, share, table
from nemo_prune.release.record import Record
from nemo_prune.release.wording import before_after_rows, layer_rows, prompt_rows, spared_rows
from nemo_prune.stages.examined import ExaminedPrompt
from nemo_prune.stages.prove import ImageProof

_COLUMNS = ("status", "kind", "score", "neurons", "under the mask", "fresh before", "fresh after", "copies before",
            "copies after", "caption")  # fmt: skip

_SPARED = ("neurons that a limit chose among", "prompts held by", "change on ordinary prompts", "prompts gone")


def write_report(work: Path, record: Record, examined: Sequence[ExaminedPrompt]) -> Path:
    """Write the full report, with every caption and what published files call it; returns its path."""
    rows = [_row(each) for each in examined]
    write_atomically(work / "report.json", json.dumps({"facts": record.to_json(), "prompts": rows}, indent=2))
    write_atomically(work / "report.md", run_report(record, rows))
    return work / "report.md"


def _row(examined: ExaminedPrompt) -> dict:
    """Everything about a prompt as JSON values."""
    return {
        "reference": examined.reference,
        "kind": examined.prompt.kind,
        "columns": to_json(examined.prompt.columns),
        **to_json(examined.localization),
        **to_json(examined.under_mask),
        **(to_json(examined.images) if examined.images else {}),
        "is_gone": examined.is_gone,
        "not_gone_because": list(examined.verdict.reasons) if examined.verdict else [],
    }


def run_report(record: Record, prompts: Sequence[Mapping]) -> str:
    """The report as text.

    Args:
        record: of the run.
        prompts: one row per prompt, as report.json has them.
    """
    rows = [
        (
            each["status"], code(each["kind"]) if each["kind"] else "", number(each["score"]), len(each["neurons"]),
            number(each["suppressed_similarity"]), number(each["score_before"]), number(each["score_after"]),
            share(each.get("copies_before")), share(each.get("copies_after")), code(each["prompt"]),
        )
        for each in prompts
    ]  # fmt: skip
    calibration = record.measured.calibration
    parts = [
        "# nemo-prune: report of a run",
        "Holds captions and images: not for publication. `report.json` has for each caption what the published record "
        "calls it (`reference`).",
        f"Base: {code(record.base.name)}. Threshold {calibration.threshold:.3f}, {calibration.origin}.",
        table(("prompts", "number"), prompt_rows(record.prompts)),
        table(("layer", "pruned", "of"), layer_rows(record.mask)),
        table(("measured", "before", "after"), before_after_rows(record)),
        *([table(_SPARED, spared_rows(record.measured.spared))] if record.measured.spared else []),
        "![before and after](grids/memorized.png)",
        "![ordinary prompts before and after](grids/ordinary.png)",
        table(_COLUMNS, rows),
    ]
    return "\n\n".join(parts) + "\n"


def save_grids(work: Path, memorized: Sequence[str], proof: ImageProof) -> Path:
    """Write two grids (training image, before, after) into the work folder.

    Returns:
        The memorized prompts' grid.
    """
    shutil.rmtree(work / "grids", ignore_errors=True)
    (work / "grids").mkdir()
    grids = {
        "memorized": [text for text in proof.texts if text in memorized],
        "ordinary": [text for text in proof.texts if text not in memorized],
    }
    for name, texts in grids.items():
        if texts:
            rows = [[proof.training_images.get(text), *proof.before[text], None, *proof.after[text]] for text in texts]
            save_grid(work / "grids" / f"{name}.png", rows)
    return work / "grids" / "memorized.png"
