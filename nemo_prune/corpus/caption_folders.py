"""Folders of caption files, as people who train keep them: tables, or pictures with a text file beside each."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_prune.corpus.rows import BESIDE_PICTURES, FORMATS, is_caption_file
from nemo_prune.errors import PromptError

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")


@dataclass(frozen=True)
class CaptionFile:
    """A file with captions.

    Attributes:
        path: the file.
        picture: the training image beside it, whose caption it is; None for a file that stands alone.
    """

    path: Path
    picture: Path | None = None


def files_of_folder(folder: Path) -> list[CaptionFile]:
    """The caption files in a folder and in those within it, sorted; hidden ones are left out.

    Raises:
        PromptError: there are none, or some text files have a picture beside them and others do not.
    """
    inside = [path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder))]
    files = _with_pictures([path for path in inside if is_caption_file(path)], inside)
    if not files:
        raise PromptError(f"The folder {folder} holds no caption file: {FORMATS}.")
    alone = [each.path for each in files if each.picture is None and _is_text(each.path)]
    if alone and any(each.picture for each in files):
        raise PromptError(
            f"The folder {folder} holds pictures with their captions, and {len(alone)} text files without a picture of "
            f"their name, the first is {alone[0].relative_to(folder)}. Move them elsewhere, or name the caption files "
            "by a pattern."
        )
    return files


def files_of_pattern(paths: Iterable[Path]) -> list[CaptionFile]:
    """The caption files among what a pattern names, sorted; pictures that it names too are not captions."""
    paths = [path for path in paths if path.is_file()]
    beside = [path for folder in {path.parent for path in paths} for path in folder.iterdir()]
    return _with_pictures([path for path in paths if not _is_picture(path)], beside)


def _with_pictures(files: Iterable[Path], beside: Iterable[Path]) -> list[CaptionFile]:
    """Caption files, the text files with the picture of their name."""
    pictures: dict[Path, Path] = {}
    for path in sorted(path for path in beside if _is_picture(path)):
        # Some programs append the ending to the picture's whole name.
        pictures |= {path: path, path.with_suffix(""): path}
    return [
        CaptionFile(path, pictures.get(path.with_suffix("")) if _is_text(path) else None)
        for path in sorted(files)
        if path.is_file()
    ]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _PICTURES


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in BESIDE_PICTURES
