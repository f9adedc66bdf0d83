"""What a push sends, packed and checked offline: a release that is as its record says, or a mask alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from huggingface_hub import RepoCard
from yaml import YAMLError

from nemo_prune.checkpoint.folder import check_files
from nemo_prune.errors import PushError, RecordError
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.layout import CARD_FILE, MASK_FILE, RELEASE_FILES, ReleaseLayout, is_licence_file
from nemo_prune.progress import Advance
from nemo_prune.release.card import named
from nemo_prune.release.record import Record
from nemo_prune.release.residual import residual_findings, with_findings

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".msgpack", ".onnx", ".pb", ".h5", ".pt", ".pth", ".gguf")
_MOST_NAMED = 5


@dataclass(frozen=True)
class Parcel:
    """Files for a repo.

    Attributes:
        files: path in the repo -> the file, or its content.
        title: what it is, in one line.
        sha256: path in the repo -> sha256 that its content must have, for the files that the record lists.
        unpruned: path in the repo -> sha256 of the unpruned weights at that path in the base.
    """

    files: Mapping[str, Path | bytes]
    title: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    unpruned: Mapping[str, str] = field(default_factory=dict)

    def check(self, advance: Advance) -> None:
        """Compare the files with the recorded hashes.

        Args:
            advance: called with the files that were compared and their number.

        Raises:
            RecordError: a file was changed since.
        """
        for done, (name, expected) in enumerate(self.sha256.items()):
            advance(done, len(self.sha256))
            if file_hash(self.files[name]) != expected:
                raise RecordError(f"{name} was changed after the export. Export the model again.")
        advance(len(self.sha256), len(self.sha256))


def pack(out: Path, repo_id: str, allow_residual: bool = False) -> Parcel:
    """What a push sends for a path.

    Args:
        out: a release (a folder, or a checkpoint in one file), or the file of a mask.
        repo_id: the repo it goes to; the card names it.
        allow_residual: whether a release in which something remains is sent too; its card then says so.

    Raises:
        PushError: there is nothing to push, something remains in it, or it contains other files.
        RecordError: its record was changed or names files that are not there.
        MaskError: it is neither a release nor a mask.
        ModelError: a file can't be read or is outside the release.
    """
    layout = ReleaseLayout.found(out)
    if layout.folder.is_dir():
        return _pack_release(layout, repo_id, allow_residual)
    if out.is_file():
        return _pack_mask(out, repo_id)
    raise PushError(f"There is nothing at {out}. Give what `run`, `export` or `merge` wrote.")


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name."""
    return name.lower().endswith(_WEIGHTS)


def some_of(names: Iterable[str]) -> str:
    """The first names of a list, for a message."""
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _pack_release(layout: ReleaseLayout, repo_id: str, allow_residual: bool) -> Parcel:
    files = layout.files()
    check_files(layout.folder, [path.relative_to(layout.folder) for path in files.values() if path != layout.file])
    record = Record.load(layout.record)
    findings = residual_findings(record)
    if findings and not allow_residual:
        raise PushError(
            "\n- ".join(("Something remains in this release:", *findings))
            + "\nSolve it and export again, or publish it as it is with --allow-residual; its card then says so."
        )
    sha256 = {**record.files.sha256, MASK_FILE: str(record.mask.sha256)}
    if missing := {*sha256, CARD_FILE} - set(files):
        raise RecordError(f"The release lacks files that its record names: {some_of(missing)}. Export the model again.")
    _refuse_others({name for name in files if name not in sha256})
    card = with_findings(named(_read_card(files[CARD_FILE]), repo_id), findings)
    title = f"Pruned by nemo-prune: {record.mask.num_neurons} memorization neurons"
    return Parcel({**files, CARD_FILE: card.encode()}, title, sha256, record.files.base_sha256)


def _read_card(path: Path) -> str:
    """Check the card before the upload: the Hub refuses broken metadata only after it."""
    try:
        card = path.read_text(encoding="utf-8")
        RepoCard(card, ignore_metadata_errors=False)
    except (ValueError, YAMLError) as error:
        raise PushError(f"The card {path} or the metadata at its head can't be read: {error}. Correct it.") from error
    return card


def _refuse_others(unrecorded: Iterable[str]) -> None:
    others = [name for name in unrecorded if name not in RELEASE_FILES and not is_licence_file(name)]
    if weights := [name for name in others if is_weights(name)]:
        raise PushError(
            f"Weights are there that the record does not name: {some_of(weights)}. Unpruned weights beside pruned ones "
            "undo the pruning. Take them out."
        )
    if others:
        raise PushError(f"Files are there that are not the release's: {some_of(others)}. Take them out.")


def _pack_mask(path: Path, repo_id: str) -> Parcel:
    # torch takes a second to load and is only needed for a mask.
    from nemo_prune.mask import NeuronMask
    from nemo_prune.release.mask_card import mask_card

    mask, facts = NeuronMask.load_with_facts(path)
    mask.check_complete()
    card = mask_card(mask, facts, repo_id).encode()
    title = f"Mask of {mask.num_neurons} memorization neurons"
    return Parcel({PurePath(MASK_FILE).name: path, CARD_FILE: card}, title)
