"""A release from a base and a mask, without searching for anything: whoever has both gets the same weights."""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from nemo_prune.checkpoint.fingerprint import check_base, tensor_digests
from nemo_prune.compute.session import model_digest
from nemo_prune.errors import MaskError
from nemo_prune.files.layout import MASK_FILE
from nemo_prune.mask import NeuronMask
from nemo_prune.models.source import ModelSource
from nemo_prune.progress import Notify, unheard
from nemo_prune.release.documents import write_release
from nemo_prune.release.licence import licence_of
from nemo_prune.release.pruned import write_weights
from nemo_prune.release.record import described_base
from nemo_prune.release.targets import check_release, staged_release
from nemo_prune.settings import Statement


def export_model(
    source: ModelSource,
    mask_file: Path,
    out: Path,
    scale: float = 0.0,
    force: bool = False,
    overwrite: bool = False,
    statement: Statement | None = None,
    notify: Notify = unheard,
) -> dict:
    """Prune a base by a finished mask and write it with mask, record and card.

    Args:
        source: the base.
        mask_file: a mask of `nemo-prune`.
        out: the folder or single file (.safetensors) to write; what stands there stays until the new one is complete.
        scale: what the masked rows are multiplied by.
        force: whether the base may be another one than the mask was made for; the card says so.
        overwrite: whether what stands there may be replaced.
        statement: what the publisher states about base and licence.
        notify: called with what a publisher has to see to.

    Returns:
        The record, JSON values only.

    Raises:
        MaskError: the mask holds no neuron, or was made for another base.
        SettingsError: what is stated contradicts the base.
        OutputError: the release can't be written.
    """
    statement = statement or Statement()
    base, licence = described_base(source, statement), licence_of(source, statement)
    check_release(source, out, overwrite)
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
    with staged_release(out, overwrite) as release:
        exported = write_weights(source, mask, release, scale)
        facts = {
            "versions": {"python": platform.python_version(), "nemo-prune": version("nemo-prune")},
            "base": base,
            "licence": licence.described(),
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
        (release.beside / MASK_FILE).parent.mkdir()
        shutil.copyfile(mask_file, release.beside / MASK_FILE)
        write_release(release.beside, facts)
    for warning in licence.warnings():
        notify(warning)
    return facts


def _check_base(source: ModelSource, mask: NeuronMask, described: dict) -> None:
    # The mask of result files knows the digest of the whole model, that of a release those of its tensors.
    if "model" not in described or described["model"] != model_digest(source):
        check_base(tensor_digests(source.folder, mask), described.get("base_tensors", {}))
