"""The record of a release as a file: sealed when it is written, checked when it is read."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from nemo_prune.errors import RecordError
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.untrusted import read_json

_SEAL = "seal"
# What every reader may count on.
_EXPECTED = {"versions": dict, "base": dict, "mask": dict, "files": dict}


def write_record(path: Path, facts: Mapping, mask_file: Path) -> None:
    """Write a record with the mask's sha256 and a seal over everything in it.

    The seal tells a slip of the hand from what was written; it does not withstand who computes it anew.

    Args:
        path: the file.
        facts: JSON values.
        mask_file: the release's mask, as it lies on disk.
    """
    recorded = {**facts, "mask": {**facts["mask"], "sha256": file_hash(mask_file)}}
    path.write_text(json.dumps({**recorded, _SEAL: _seal(recorded)}, indent=2), encoding="utf-8")


def read_record(path: Path) -> dict:
    """Read a record that :func:`write_record` wrote; its seal is checked and left out.

    Raises:
        RecordError: there is none, it is damaged, or it was changed since.
    """
    try:
        recorded = read_json(path)
    except FileNotFoundError as error:
        raise RecordError(f"There is no {path.name} in {path.parent}. Give a folder that nemo-prune wrote.") from error
    except (ValueError, OSError) as error:
        raise RecordError(f"{path.name} is no record of nemo-prune: {error}. Export the model again.") from error
    complete = isinstance(recorded, dict) and all(
        isinstance(recorded.get(key), kind) for key, kind in _EXPECTED.items()
    )
    if not complete:
        raise RecordError(f"{path.name} is no record of nemo-prune, or one of another version. Export the model again.")
    if recorded.pop(_SEAL, None) != _seal(recorded):
        raise RecordError(f"{path.name} was changed after the export. Export the model again.")
    return recorded


def _seal(facts: Mapping) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
