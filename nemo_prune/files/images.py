"""Images in the work folder: each is drawn once, even if a run is stopped in between."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from nemo_prune.files.staging import staged_file
from nemo_prune.files.work import write_atomically

_IDENTITY = "depends_on.json"


class ImageFolder:
    """A folder of lossless images, one file per image.

    Args:
        path: the folder; created if missing.
        depends_on: what the images depend on, as JSON values; a folder of other images is emptied first.
    """

    def __init__(self, path: Path, depends_on: dict) -> None:
        self._path = path
        described = json.dumps(depends_on, sort_keys=True)
        identity = path / _IDENTITY
        if not identity.exists() or identity.read_text(encoding="utf-8") != described:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            write_atomically(identity, described)

    def keeps(self, name: str, number: int) -> bool:
        """Whether so many images are kept under a name."""
        return all(file.exists() for file in self._files(name, number))

    def kept_or_drawn(self, name: str, number: int, draw: Callable[[], Sequence[Image.Image]]) -> list[Image.Image]:
        """Images under a name: the kept ones, or new ones, which are then kept.

        Args:
            name: beginning of their file names.
            number: how many there are.
            draw: makes them.
        """
        return self.kept_or_drawn_together([name], number, lambda: [draw()])[0]

    def kept_or_drawn_together(
        self, names: Sequence[str], number: int, draw: Callable[[], Sequence[Sequence[Image.Image]]]
    ) -> list[list[Image.Image]]:
        """Images under several names that are drawn in one go: where one is missing all are drawn again.

        Args:
            names: beginnings of their file names.
            number: how many there are under each.
            draw: makes them, name by name.
        """
        files = [self._files(name, number) for name in names]
        if not all(self.keeps(name, number) for name in names):
            for of_name, images in zip(files, draw(), strict=True):
                for file, image in zip(of_name, images, strict=True):
                    with staged_file(file) as partial:
                        image.save(partial, format="png")
        return [[Image.open(file).convert("RGB") for file in of_name] for of_name in files]

    def _files(self, name: str, number: int) -> list[Path]:
        return [self._path / f"{name}_{place}.png" for place in range(number)]
