"""A release from a base and a mask, without searching for anything: base and mask always give the same weights."""

from pathlib import Path

from nemo_prune.checkpoint.fingerprint import check_base, tensor_digests
from nemo_prune.errors import MaskError
from nemo_prune.facts import MaskFacts
from nemo_prune.mask import NeuronMask, Pruning
from nemo_prune.models.source import ModelSource
from nemo_prune.progress import Listener
from nemo_prune.release.licence import licence_of
from nemo_prune.release.record import MaskRecord, Record
from nemo_prune.release.recording import base_facts, versions
from nemo_prune.release.writing import check_release, staged_release, write_documents, write_mask, write_weights
from nemo_prune.settings import Statement


def export_model(
    source: ModelSource,
    mask_file: Path,
    out: Path,
    scale: float = 0.0,
    force: bool = False,
    overwrite: bool = False,
    statement: Statement = Statement(),
    listener: Listener = Listener(),
) -> Record:
    """Prune a base by a finished mask and write it with mask, record and card.

    Args:
        source: the base.
        mask_file: a mask of `nemo-prune`.
        out: the folder or single file (.safetensors) to write; what stands there stays until the new one is complete.
        scale: what the masked rows are multiplied by.
        force: whether the base may be another one than the mask was made for; the card says so.
        overwrite: whether what stands there may be replaced.
        statement: what the publisher states about base and licence.
        listener: hears what the publisher has to see to.

    Raises:
        MaskError: the mask holds no neuron, or was made for another base.
        SettingsError: what is stated contradicts the base.
        OutputError: the release can't be written.
    """
    base, licence = base_facts(source, statement), licence_of(source, statement)
    check_release(source, out, overwrite)
    mask, facts = NeuronMask.load_with_facts(mask_file)
    if not mask.num_neurons:
        raise MaskError(f"{mask_file} holds no neuron, so there is nothing to prune.")
    is_its_base = _is_its_base(source, mask, facts, force)
    with staged_release(out, overwrite) as release:
        files = write_weights(source, Pruning(mask, scale), release, loadable=False)
        record = Record(
            versions=versions(["nemo-prune"]),
            base=base,
            licence=licence,
            mask=MaskRecord.of(mask, scale=scale, made_for=facts.base, forced_on_another_base=not is_its_base),
            prompts=facts.prompts,
            files=files,
        )
        write_mask(release, mask, facts)
        record = write_documents(release.layout, record)
    for warning in (*source.notes, *licence.warnings()):
        listener.say(warning)
    return record


def _is_its_base(source: ModelSource, mask: NeuronMask, facts: MaskFacts, force: bool) -> bool:
    """Whether the mask was made for this base; without ``force`` another one is refused."""
    # The mask of result files knows the digest of the whole model, that of a release those of its tensors.
    if facts.model is not None and facts.model == source.digest:
        return True
    try:
        check_base(tensor_digests(source.files, mask), facts.base_tensors or {})
    except MaskError:
        if not force:
            raise
        return False
    return True
