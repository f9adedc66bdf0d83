"""The work folder: what a run resumes from and never publishes."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_prune.errors import OutputError
from nemo_prune.files.locks import lock_for_this_process
from nemo_prune.files.staging import staged_file, writing

_IDENTITY, _LOCK = "run.json", ".lock"


def claim_work_folder(path: Path) -> None:
    """Make a work folder where it is missing, and keep other processes out of it until this one ends.

    Raises:
        OutputError: another process works there, the folder holds something else, or it can't be used.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_what_is_not_a_work_folder(path)
    except OSError as error:
        raise OutputError(f"The work folder {path} can't be used: {error}. Use another --work.") from error
    busy = OutputError(
        f"Another process works in {path}. Wait until it is done, stop it, or use another --work: two would mix up "
        "what they find."
    )
    lock_for_this_process(path / _LOCK, busy)


def _refuse_what_is_not_a_work_folder(path: Path) -> None:
    names = {each.name for each in path.iterdir()}
    if names - {_LOCK} and _IDENTITY not in names:
        raise OutputError(f"{path} is not empty and not a work folder. Use another --work.")


class WorkFiles:
    """Where everything of a run lies in its work folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def calibration(self) -> Path:
        """The calibration, once it is finished."""
        return self.path / "calibration.safetensors"

    @property
    def localizations(self) -> Path:
        """The results, one line per prompt."""
        return self.path / "localizations.jsonl"

    @property
    def answers(self) -> Path:
        """Where the similarities are that were asked for, one line per batch."""
        return self.path / "answers.jsonl"

    @property
    def released_answers(self) -> Path:
        """The same of what a release would answer, where other neurons stand in for suppressed ones."""
        return self.path / "released_answers.jsonl"

    @property
    def detected(self) -> Path:
        """Where memorized prompts are as they were detected, one file per prompt."""
        return self.path / "detected"

    @property
    def usual_moments(self) -> Path:
        """What attention takes from the neurons on ordinary prompts."""
        return self.path / "usual_moments.safetensors"

    @property
    def memorized_moments(self) -> Path:
        """The same on memorized prompts."""
        return self.path / "memorized_moments.safetensors"

    @property
    def neuron_costs(self) -> Path:
        """What each neuron costs ordinary prompts."""
        return self.path / "neuron_costs.safetensors"

    @property
    def thinned(self) -> Path:
        """The mask without what costs ordinary prompts most."""
        return self.path / "thinned.jsonl"

    @property
    def held(self) -> Path:
        """How hard memorized prompts were held, one line a round."""
        return self.path / "held.jsonl"

    @property
    def rounds(self) -> Path:
        """The masks that were completed for what copied, one line each."""
        return self.path / "rounds.jsonl"

    @property
    def mask(self) -> Path:
        """The whole mask; that of the release withholds what undoes a part of the pruning."""
        return self.path / "mask.safetensors"

    @property
    def views(self) -> Path:
        """What is predicted for the captions that masks are judged on, on fresh seeds."""
        return self.path / "views"

    @property
    def cost(self) -> Path:
        """What the final mask changes for ordinary prompts."""
        return self.path / "cost.jsonl"

    @property
    def judged(self) -> Path:
        """How captions measure under masks, one line per mask and caption."""
        return self.path / "judged.jsonl"

    @property
    def looks(self) -> Path:
        """What copied in images under masks that were tried, one line per look."""
        return self.path / "looks.jsonl"

    @property
    def verified(self) -> Path:
        """The scores under the mask, one line per prompt."""
        return self.path / "verified.jsonl"

    @property
    def images(self) -> Path:
        """The images that were drawn before and after."""
        return self.path / "images"

    @property
    def evidence(self) -> Path:
        """What the evidence of the run consists of; `verify` has a folder of its own beside it."""
        return self.path / "run_evidence"

    @property
    def prompt_key(self) -> Path:
        """The secret key of the references to prompts."""
        return self.path / "prompt_key"

    def search(self, name: str) -> "SearchFiles":
        """Where one search for a mask of the whole corpus lies; its name tells it from others of this work folder."""
        return SearchFiles(self.path / "searches" / name)


class SearchFiles:
    """Where everything of one search for a mask of the whole corpus lies.

    Args:
        path: the folder; created if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def shown(self) -> Path:
        """The timestep at which what came back shows."""
        return self.path / "shown.jsonl"

    @property
    def views(self) -> Path:
        """What is predicted for the captions that its masks are judged on."""
        return self.path / "views"

    @property
    def judged(self) -> Path:
        """How captions measure under masks, one line per mask and caption."""
        return self.path / "judged.jsonl"

    @property
    def learning(self) -> Path:
        """Where the learning of gates stands."""
        return self.path / "learning.pt"

    @property
    def completed(self) -> Path:
        """What the learned mask was completed by, one line per caption."""
        return self.path / "completed.jsonl"

    @property
    def reopened(self) -> Path:
        """The orders in which neurons were tried to act again, and what came of each try."""
        return self.path / "reopened.jsonl"


class WorkFolder(WorkFiles):
    """The folder with the identity of what it holds.

    Args:
        path: the folder; created if missing.
        identity: what the results depend on (model, settings, prompts), as JSON values.
        overwrite: start afresh if the folder holds results of another identity.

    Raises:
        OutputError: the folder holds results of another identity, another process works in it, or it can't be used.
    """

    def __init__(self, path: Path, identity: dict, overwrite: bool = False) -> None:
        super().__init__(path)
        identity = json.loads(json.dumps(identity))
        claim_work_folder(path)
        try:
            known = self._read_identity()
            if known is not None and known != identity:
                changed = sorted(key for key in identity if known.get(key) != identity[key])
                if not overwrite:
                    raise OutputError(
                        f"The work folder {path} holds another run's results; changed since: "
                        f"{', '.join(changed)}. Use another --work, or --overwrite to start afresh."
                    )
                self._clear()
            write_atomically(path / _IDENTITY, json.dumps(identity, indent=2))
        except OSError as error:
            raise OutputError(f"The work folder {path} can't be used: {error}") from error

    def _read_identity(self) -> dict | None:
        path = self.path / _IDENTITY
        if path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return {}
        # A process that was killed before it wrote the identity leaves its lock, and nothing else.
        _refuse_what_is_not_a_work_folder(self.path)
        return None

    def _clear(self) -> None:
        """Remove everything but the lock, which this process has."""
        for each in self.path.iterdir():
            if each.name != _LOCK:
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


class LineLog:
    """A file of JSON lines that grows; every line that was appended survives a kill.

    Args:
        path: the file; created with the first line. A last line that a kill cut off is dropped.
        depends_on: what the records depend on, as JSON values; it is the file's first line. A file with
            another first line is started afresh.
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


class Replay:
    """Makes decisions in their order and keeps them; those that were kept before a stop are given again.

    Args:
        log: of the decisions; None keeps nothing.
    """

    def __init__(self, log: LineLog | None) -> None:
        self._log, self._known = log, iter(list(log or ()))

    def __call__(self, decide: Callable[..., Any], *given: object) -> Any:
        """The next decision, as JSON values: what the function returns for what it is given."""
        for known in self._known:
            return known
        decision = decide(*given)
        if self._log is not None:
            self._log.append(decision)
        return decision


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in one step: at any time the old file or the whole new one is there."""
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
