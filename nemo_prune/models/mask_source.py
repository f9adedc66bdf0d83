"""Where a mask comes from: a file, a release, or a repo of the Hub."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from nemo_prune.errors import MaskError
from nemo_prune.files.layout import MASK_FILE, SAFETENSORS, ReleaseLayout, has_ending
from nemo_prune.hub.errors import named_errors

_ALONE = Path(MASK_FILE).name
# In a release, and in a folder or repo that holds a mask alone.
_PLACES = (MASK_FILE, _ALONE)
_REPO = re.compile(r"(?P<repo_id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>.+))?", re.ASCII)


def find_mask(name: str | Path) -> Path:
    """The file of a mask; from the Hub that file alone is fetched.

    Args:
        name: a mask file, a release (a folder, or a single-file checkpoint with its folder beside it), or a repo of
            the Hub that holds a release or a mask, ``owner/name`` or ``owner/name@revision``.

    Raises:
        MaskError: there is none.
    """
    path = Path(name)
    if path.is_dir():
        found = [path / place for place in _PLACES if (path / place).is_file()]
        if not found:
            raise MaskError(f"{path} holds no mask: neither {' nor '.join(_PLACES)}. Give a release or a mask file.")
        return found[0]
    if path.is_file():
        beside = ReleaseLayout.found(path).mask
        return beside if beside.is_file() else path
    repo = _REPO.fullmatch(str(name))
    if repo is None or has_ending(path, SAFETENSORS):
        raise MaskError(f"There is no mask at {name}. Give a mask file, a release, or a repo of the Hub: owner/name.")
    return _fetch(**repo.groupdict())


def _fetch(repo_id: str, revision: str | None) -> Path:
    where = f"`{repo_id}`" + (f" at `{revision}`" if revision else "")
    with named_errors(MaskError, f"The mask of {where} ({' or '.join(_PLACES)}) can't be fetched"):
        try:
            return Path(hf_hub_download(repo_id, MASK_FILE, revision=revision))
        except EntryNotFoundError:
            return Path(hf_hub_download(repo_id, _ALONE, revision=revision))
