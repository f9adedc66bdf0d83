"""The work folder: what a run knows and resumes from, and never publishes."""

import json
import os
import shutil
from pathlib import Path

from nemo_prune.errors import OutputError

_IDENTITY = "run.json"


class WorkFolder:
    """The folder with the identity of what it holds.

    Args:
        path: the folder; it is made where it is missing.
        identity: what the results depend on (model, settings, prompts), as JSON values.
        overwrite: start afresh where the folder holds results of another identity.

    Raises:
        OutputError: the folder holds results of another identity, or can't be used.
    """

    def __init__(self, path: Path, identity: dict, overwrite: bool = False) -> None:
        self.path = path
        identity = json.loads(json.dumps(identity))
        try:
            path.mkdir(parents=True, exist_ok=True)
            known = self._read_identity()
            if known is not None and known != identity:
                changed = sorted(key for key in identity if known.get(key) != identity[key])
                if not overwrite:
                    raise OutputError(
                        f"The work folder {path} holds another run's results; changed since: "
                        f"{', '.join(changed)}. Use another --work, or --overwrite to start afresh."
                    )
                shutil.rmtree(path)
                path.mkdir()
            write_atomically(path / _IDENTITY, json.dumps(identity, indent=2))
        except OSError as error:
            raise OutputError(f"The work folder {path} can't be used: {error}") from error

    @property
    def calibration(self) -> Path:
        """Where the calibration lies, once it is finished."""
        return self.path / "calibration.safetensors"

    @property
    def localizations(self) -> Path:
        """Where the results lie, a line a prompt."""
        return self.path / "localizations.jsonl"

    def _read_identity(self) -> dict | None:
        path = self.path / _IDENTITY
        if path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return {}
        if any(self.path.iterdir()):
            raise OutputError(f"{self.path} is not empty and no work folder. Use another --work.")
        return None


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the whole new one."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
