"""The work folder: what a run knows and resumes from, and never publishes."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_prune.errors import OutputError
from nemo_prune.files.staging import staged_file, writing

_IDENTITY = "run.json"
_LONGEST_LINE = 2**22


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

    @property
    def costs(self) -> Path:
        """Where the neurons' costs lie, a line a batch."""
        return self.path / "costs.jsonl"

    @property
    def answers(self) -> Path:
        """Where the similarities are that were asked for, one line per batch."""
        return self.path / "answers.jsonl"

    @property
    def detected(self) -> Path:
        """Where memorized prompts are as they were detected, one file per prompt."""
        return self.path / "detected"

    @property
    def verified(self) -> Path:
        """Where the scores under the mask lie, a line a prompt."""
        return self.path / "verified.jsonl"

    @property
    def images(self) -> Path:
        """Where the images lie that were drawn before and after."""
        return self.path / "images"

    @property
    def prompt_key(self) -> Path:
        """Where the secret key lies that makes references to prompts."""
        return self.path / "prompt_key"

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


class LineLog:
    """A file of JSON lines that grows; every line that was appended survives a kill.

    Args:
        path: the file; it is begun with the first line. A last line that a kill cut off is dropped.
        depends_on: what the records depend on, as JSON values; it is the file's first line. A file that
            depends on something else is begun anew.
    """

    def __init__(self, path: Path, depends_on: dict | None = None) -> None:
        self._path = path
        self._num_headers = 0 if depends_on is None else 1
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
        if depends_on is not None and next(self._lines(), None) != json.loads(json.dumps(depends_on)):
            path.unlink(missing_ok=True)
            self.append(depends_on)

    def __iter__(self) -> Iterator[Any]:
        return islice(self._lines(), self._num_headers, None)

    def _lines(self) -> Iterator[Any]:
        if self._path.exists():
            with self._path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def append(self, record: dict | list, synced: bool = True) -> None:
        """Keep a record; it survives a kill of the process when this returns.

        Args:
            record: JSON values.
            synced: whether it must be on disk too, so that it survives a loss of power.

        Raises:
            OutputError: it can't be written.
        """
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            if synced:
                os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the whole new one."""
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
