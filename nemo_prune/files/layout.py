"""Where the files of a release are, on disk and in a repo of the Hub."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

CARD_FILE = "README.md"
RECORD_FILE = "nemo_prune.json"
SAFETENSORS = ".safetensors"
# Holds the files of a folder, or of a repo, that only nemo-prune writes.
_OWN_FOLDER = "nemo_prune"
# A checkpoint in one file, such as model.safetensors, has all other files in a folder beside it: model.nemo_prune/.
_SINGLE_SUFFIX = ".nemo_prune"
# Reading them can run programs, so nemo-prune never writes them.
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")

_LICENCE_SUFFIXES = ("", ".md", ".txt", ".rst", ".html", ".pdf")


@dataclass(frozen=True)
class ReleaseLayout:
    """Where the files of a release are.

    Attributes:
        folder: the folder of record, card, mask and pictures. For a diffusers folder it is the release itself.
        file: the single file of a release that is one; None for a diffusers folder.
    """

    folder: Path
    file: Path | None = None

    @classmethod
    def of(cls, out: Path) -> "ReleaseLayout":
        """The layout of a release that will be at a path: its name says whether it is a folder or a single file."""
        is_file = has_ending(out, SAFETENSORS, *_PICKLES)
        return cls(out.with_suffix(_SINGLE_SUFFIX), out) if is_file else cls(out)

    @classmethod
    def found(cls, path: Path) -> "ReleaseLayout":
        """The layout of a release that is at a path: a folder, or a single file whatever its name is."""
        return cls(path.with_suffix(_SINGLE_SUFFIX), path) if path.is_file() else cls(path)

    @property
    def work(self) -> Path:
        """The work folder of a run, unless another is given: beside the release."""
        return self.file.with_suffix(".work") if self.file else self.folder.with_name(f"{self.folder.name}.work")

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / CARD_FILE

    @property
    def record(self) -> Path:
        """The record of what was done and measured."""
        return self.folder / RECORD_FILE

    @property
    def mask(self) -> Path:
        """The mask."""
        return self._own("mask.safetensors")

    @property
    def plot(self) -> Path:
        """The picture of the pruned neurons per layer."""
        return self._own("neurons_per_layer.png")

    @property
    def grid(self) -> Path:
        """The before/after grid, if examples are published."""
        return self._own("before_after.png")

    def name(self, path: Path) -> str:
        """The name that the card, which is in the same folder, uses for a file of the release."""
        return path.relative_to(self.folder).as_posix()

    def in_repo(self, path: Path) -> str:
        """The path of a file of the release in a repo of the Hub, where everything is as in a diffusers folder."""
        if path == self.file:
            return path.name
        own = {each: each.name for each in (self.mask, self.plot, self.grid)}
        return f"{_OWN_FOLDER}/{own[path]}" if path in own else self.name(path)

    def files(self) -> dict[str, Path]:
        """Path in a repo -> path on disk of every file that is there, sorted; links are not followed into folders."""
        found = [Path(where, name) for where, _, names in os.walk(self.folder) for name in names]
        found += [self.file] if self.file else []
        return {self.in_repo(path): path for path in sorted(found)}

    def _own(self, name: str) -> Path:
        return self.folder / name if self.file else self.folder / _OWN_FOLDER / name


# The same in a folder and in a repo.
_IN_REPO = ReleaseLayout(Path())
MASK_FILE, PLOT_FILE, GRID_FILE = (path.as_posix() for path in (_IN_REPO.mask, _IN_REPO.plot, _IN_REPO.grid))
RELEASE_FILES = frozenset((CARD_FILE, RECORD_FILE, MASK_FILE, PLOT_FILE, GRID_FILE))


def has_ending(path: PurePath, *endings: str) -> bool:
    """Whether a file's name ends in one of some endings, such as ``.safetensors``, in upper or lower case."""
    return path.suffix.lower() in endings


def is_licence_file(name: str) -> bool:
    """Whether a file at the root of a model is a licence text or notice, whatever it is called exactly."""
    upper, suffix = name.upper(), PurePath(name).suffix.lower()
    named = "LICENSE" in upper or "LICENCE" in upper or upper.startswith(("NOTICE", "COPYING", "USE_POLICY"))
    return named and (suffix in _LICENCE_SUFFIXES or suffix[1:].isdigit())
