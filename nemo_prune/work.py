"""The work folder: what a run knows and resumes from, and never publishes."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from nemo_prune.calibration import Calibration
from nemo_prune.errors import OutputError
from nemo_prune.localize import PromptLocalization
from nemo_prune.mask import Neuron

_IDENTITY, _CALIBRATION, _LOCALIZATIONS = "run.json", "calibration.safetensors", "localizations.jsonl"


class WorkFolder:
    """Results as they come; every one survives a kill.

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
            self._repair_torn_line()
        except OSError as error:
            raise OutputError(f"The work folder {path} can't be used: {error}") from error

    def load_calibration(self) -> Calibration | None:
        """The calibration, if it was finished."""
        path = self.path / _CALIBRATION
        return Calibration.load(path) if path.exists() else None

    def save_calibration(self, calibration: Calibration) -> None:
        """Keep a finished calibration."""
        partial = self.path / f".{_CALIBRATION}"
        calibration.save(partial)
        os.replace(partial, self.path / _CALIBRATION)

    def localizations(self) -> dict[str, PromptLocalization]:
        """Prompt -> what was found for it, for all prompts that are done."""
        path = self.path / _LOCALIZATIONS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = (_localization_from(json.loads(line)) for line in lines)
        return {each.prompt: each for each in found}

    def append_localization(self, localization: PromptLocalization) -> None:
        """Keep one prompt's result; it is on disk when this returns."""
        with (self.path / _LOCALIZATIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(localization), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

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

    def _repair_torn_line(self) -> None:
        """Drop a last line that a kill cut off; its prompt is done again."""
        path = self.path / _LOCALIZATIONS
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the whole new one."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _localization_from(record: dict) -> PromptLocalization:
    for key in ("candidates", "neurons"):
        record[key] = tuple(Neuron(*neuron) for neuron in record[key])
    return PromptLocalization(**{**record, "kept_seeds": tuple(record["kept_seeds"])})
