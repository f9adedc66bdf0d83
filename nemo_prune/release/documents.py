"""What lies beside pruned weights for publication: mask, record, plot and card."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.engine.merge import prompts_per_neuron
from nemo_prune.files.layout import CARD_FILE, GRID_FILE, MASK_FILE, PLOT_FILE, RECORD_FILE
from nemo_prune.files.pictures import save_layer_bars
from nemo_prune.release.card import model_card
from nemo_prune.release.record import Findings
from nemo_prune.release.sealed import write_record


def release_run(folder: Path, findings: Findings, facts: Mapping, grid: Path) -> None:
    """Put mask, record, plot and card beside the weights that a run pruned; captions and the grid only if asked for.

    Args:
        folder: the pruned model.
        findings: what the run found.
        facts: its record.
        grid: the memorized prompts' before/after grid in the work folder.
    """
    options, mask = findings.options, findings.mask
    described = {key: facts[key] for key in ("base", "settings", "prompts", "versions")}
    described["scale"], described["merge"] = options.scale, options.merge
    described["prompts_per_neuron"] = prompts_per_neuron(findings.localizations, mask, options.include_unresolved)
    described["base_tensors"] = tensor_digests(findings.source.folder, mask)
    (folder / MASK_FILE).parent.mkdir()
    mask.save(folder / MASK_FILE, described)
    examples: list[str] = []
    if options.publish_examples:
        memorized = set(findings.memorized)
        examples = [each.prompt for each in findings.evidence if each.prompt in memorized]
        shutil.copyfile(grid, folder / GRID_FILE)
    write_release(folder, facts, examples)


def write_release(folder: Path, facts: Mapping, examples: Sequence[str] = ()) -> None:
    """Put record, plot and card beside pruned weights and their mask.

    Args:
        folder: the pruned model, with its mask in place.
        facts: the record of a run or of an export.
        examples: captions to publish; their grid is in place too.
    """
    write_record(folder / RECORD_FILE, facts, folder / MASK_FILE)
    save_layer_bars(folder / PLOT_FILE, facts["mask"]["counts"], facts["mask"]["sizes"])
    (folder / CARD_FILE).write_text(model_card(facts, examples), encoding="utf-8")
