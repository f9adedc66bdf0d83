"""The report of a run: every caption and image, for the work folder and never for publication."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.files.work import write_atomically
from nemo_prune.proof.images import save_grid
from nemo_prune.release.markdown import code, number, share, table
from nemo_prune.release.record import Findings
from nemo_prune.release.wording import before_after_rows, layer_rows, prompt_rows

Images = Mapping[str, Sequence[Image.Image]]

_COLUMNS = ("status", "kind", "score", "neurons", "under the mask", "fresh before", "fresh after", "copies before",
            "copies after", "caption")  # fmt: skip


def write_report(work: Path, findings: Findings, facts: Mapping, prompts: Sequence[Prompt]) -> Path:
    """Write the full report, with every caption and what published files call it; returns its path."""
    evidence = {each.prompt: asdict(each) for each in findings.evidence}
    records = [
        {
            "reference": findings.references[prompt.text],
            "kind": prompt.kind,
            "columns": dict(prompt.columns),
            **asdict(localization),
            **asdict(verified),
            **evidence.get(prompt.text, {}),
        }
        for prompt, localization, verified in zip(prompts, findings.localizations, findings.verified, strict=True)
    ]
    write_atomically(work / "report.json", json.dumps({"facts": facts, "prompts": records}, indent=2))
    write_atomically(work / "report.md", run_report(facts, records))
    return work / "report.md"


def run_report(facts: Mapping, prompts: Sequence[Mapping]) -> str:
    """The report as text.

    Args:
        facts: the record of the run.
        prompts: a record a prompt, as they stand in report.json.
    """
    rows = [
        (
            each["status"], code(each["kind"]) if each["kind"] else "", number(each["score"]), len(each["neurons"]),
            number(each["suppressed_similarity"]), number(each["score_before"]), number(each["score_after"]),
            share(each.get("copies_before")), share(each.get("copies_after")), code(each["prompt"]),
        )
        for each in prompts
    ]  # fmt: skip
    calibration = facts["calibration"]
    parts = [
        "# nemo-prune: report of a run",
        "Holds captions and images: not for publication. `report.json` has for each caption what the published record "
        "calls it (`reference`).",
        f"Base: {code(facts['base']['name'])}. Threshold {calibration['threshold']:.3f}, {calibration['origin']}.",
        table(("prompts", "number"), prompt_rows(facts["prompts"])),
        table(("layer", "pruned", "of"), layer_rows(facts["mask"])),
        table(("measured", "before", "after"), before_after_rows(facts)),
        "![before and after](grids/memorized.png)",
        "![ordinary prompts before and after](grids/ordinary.png)",
        table(_COLUMNS, rows),
    ]
    return "\n\n".join(parts) + "\n"


def save_grids(
    work: Path, memorized: Sequence[str], training_images: Mapping[str, Image.Image], before: Images, after: Images
) -> Path:
    """Write two grids (training image, before, after) into the work folder.

    Returns:
        The memorized prompts' grid.
    """
    shutil.rmtree(work / "grids", ignore_errors=True)
    (work / "grids").mkdir()
    grids = {
        "memorized": [text for text in before if text in memorized],
        "ordinary": [text for text in before if text not in memorized],
    }
    for name, texts in grids.items():
        if texts:
            rows = [[training_images.get(text), *before[text], None, *after[text]] for text in texts]
            save_grid(work / "grids" / f"{name}.png", rows)
    return work / "grids" / "memorized.png"
