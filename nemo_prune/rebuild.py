"""A release from a base and a mask, without searching for anything: whoever has both gets the same weights."""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from nemo_prune.card import licence_fields, model_card
from nemo_prune.errors import MaskError
from nemo_prune.export import export_checkpoint, export_size
from nemo_prune.fingerprint import check_base, tensor_digests
from nemo_prune.layout import CARD_FILE, MASK_FILE, RECORD_FILE
from nemo_prune.mask import NeuronMask
from nemo_prune.sealed import write_record
from nemo_prune.session import model_digest
from nemo_prune.source import ModelSource
from nemo_prune.staging import check_release_target, staged_folder


def export_model(
    source: ModelSource, mask_file: Path, out: Path, scale: float = 0.0, force: bool = False, overwrite: bool = False
) -> dict:
    """Prune a base by a finished mask and write it with mask, record and card.

    Args:
        source: the base.
        mask_file: a mask of `nemo-prune`.
        out: the folder to write; what stands there stays until the new one is complete.
        scale: what the masked rows are multiplied by.
        force: whether the base may be another one than the mask was made for; the card says so.
        overwrite: whether a folder that is not empty may be replaced.

    Returns:
        The record, JSON values only.

    Raises:
        MaskError: the mask holds no neuron, or was made for another base.
        OutputError: the folder can't be written.
    """
    check_release_target(out, source.folder, export_size(source.folder), overwrite)
    mask, described = NeuronMask.load_with_metadata(mask_file)
    if not mask.num_neurons:
        raise MaskError(f"{mask_file} holds no neuron, so that there is nothing to prune.")
    is_its_base = True
    try:
        _check_base(source, mask, described)
    except MaskError:
        if not force:
            raise
        is_its_base = False
    with staged_folder(out, overwrite) as folder:
        exported = export_checkpoint(source.folder, mask, folder, scale)
        facts = {
            "versions": {"python": platform.python_version(), "nemo-prune": version("nemo-prune")},
            "base": source.described(),
            "mask": {
                "num_neurons": mask.num_neurons,
                "counts": mask.counts,
                "sizes": mask.sizes,
                "scale": scale,
                "made_for": described.get("base"),
                "forced_on_another_base": not is_its_base,
            },
            "prompts": described.get("prompts"),
            "files": exported.described(),
        }
        (folder / MASK_FILE).parent.mkdir()
        shutil.copyfile(mask_file, folder / MASK_FILE)
        write_record(folder / RECORD_FILE, facts, folder / MASK_FILE)
        (folder / CARD_FILE).write_text(model_card(facts, licence_fields(source.folder)), encoding="utf-8")
    return facts


def _check_base(source: ModelSource, mask: NeuronMask, described: dict) -> None:
    # The mask of result files knows the digest of the whole model, that of a release those of its tensors.
    if described.get("model") != model_digest(source):
        check_base(tensor_digests(source.folder, mask), described.get("base_tensors", {}))
