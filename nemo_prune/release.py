"""What a run writes: the release for publication, and the report of the work folder."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from nemo_prune.card import licence_fields, model_card, run_report
from nemo_prune.fingerprint import tensor_digests
from nemo_prune.layout import CARD_FILE, GRID_FILE, MASK_FILE, RECORD_FILE
from nemo_prune.prompts import Prompt
from nemo_prune.record import Findings
from nemo_prune.sealed import write_record
from nemo_prune.verify import save_grid
from nemo_prune.work import write_atomically

Images = Mapping[str, Sequence[Image.Image]]


def mask_file(path: Path) -> Path:
    """The mask of a release, or the mask file that a path names itself."""
    return path / MASK_FILE if path.is_dir() else path


def write_release(folder: Path, findings: Findings, facts: Mapping, grid: Path) -> None:
    """Put mask, record and card beside the pruned weights; captions and the grid only if asked for.

    Args:
        folder: the pruned model.
        findings: what the run found.
        facts: its record.
        grid: the memorized prompts' before/after grid in the work folder.
    """
    (folder / MASK_FILE).parent.mkdir()
    described = {key: facts[key] for key in ("base", "settings", "prompts", "files", "versions")}
    described["base_tensors"] = tensor_digests(findings.source.folder, findings.mask)
    findings.mask.save(folder / MASK_FILE, described)
    write_record(folder / RECORD_FILE, facts, folder / MASK_FILE)
    examples: list[str] = []
    if findings.options.publish_examples:
        memorized = set(findings.memorized)
        examples = [each.prompt for each in findings.evidence if each.prompt in memorized]
        shutil.copyfile(grid, folder / GRID_FILE)
    card = model_card(facts, licence_fields(findings.source.folder), examples, GRID_FILE)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def write_report(work: Path, findings: Findings, facts: Mapping, prompts: Sequence[Prompt]) -> Path:
    """Write the full report, with every caption, into the work folder; returns its path."""
    evidence = {each.prompt: asdict(each) for each in findings.evidence}
    records = [
        {
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
