"""Where prompts come from: text files, tables and data sets of the Hub."""

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path

from nemo_prune.corpus.caption_folders import CaptionFile, files_of_folder, files_of_pattern
from nemo_prune.corpus.rows import (
    FORMATS,
    Row,
    caption_column,
    captions_of,
    find_column,
    folded,
    plain_text,
    read_rows,
)
from nemo_prune.errors import PromptError
from nemo_prune.files.tables import TableError

NEAR_DUPLICATE_OVERLAP = 0.5
MOST_PROMPTS_COMPARED = 20_000
_KIND_COLUMN = "type"
# The second is what the `imagefolder` data sets of the Hub call it.
_IMAGE_COLUMNS = ("image", "file_name")
_REGION_COLUMN = "mask"


@dataclass(frozen=True)
class Prompt:
    """A caption to localize.

    Attributes:
        text: the caption.
        kind: what its file's ``type`` column says, such as ``VM``, ``TM`` or ``ordinary``.
        image: the training image that it may give back, if the ``image`` column names a file.
        columns: the other columns of its row, as text.
        region: the fixed region of a template, if the ``mask`` column names a black and white picture.
    """

    text: str
    kind: str | None = None
    image: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    region: Path | None = None


@dataclass(frozen=True)
class Corpus:
    """Prompts, every caption once.

    Attributes:
        prompts: in the order of their source.
        num_duplicates: how many more captions were exactly the same as one of them.
        num_empty: how many rows had no caption.
    """

    prompts: tuple[Prompt, ...]
    num_duplicates: int
    num_empty: int = 0

    @property
    def texts(self) -> list[str]:
        """The captions."""
        return [prompt.text for prompt in self.prompts]


def read_prompts(source: str | Path, column: str | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of a source; see :func:`read_corpus`."""
    return list(read_corpus(source, column, limit).prompts)


def read_corpus(source: str | Path, column: str | None = None, limit: int | None = None) -> Corpus:
    """Read prompts, every caption once, in the order of their source.

    Args:
        source: a local file: .txt with one prompt per line; .csv or .tsv with any delimiter, .json, .jsonl or .parquet
            with a caption column; each also as .gz. A folder or a pattern such as ``captions/*.jsonl`` takes several;
            there a .txt beside a picture of its name is the caption of that training image. Or a data set of the Hub:
            ``owner/name``, ``owner/name:split`` or ``owner/name:split:column``.
        column: name of the caption column; caption, prompt or text unless given. Case, and spaces around a name, do
            not matter. Columns ``type``, ``image`` and ``mask`` (paths relative to the file) are understood, others
            travel along. A list in the caption column gives one prompt for each of its texts.
        limit: take the first so many prompts only.

    Raises:
        PromptError: the source is missing, damaged, has no caption column or holds no prompt.
    """
    unique: dict[str, Prompt] = {}
    num_duplicates = num_empty = 0
    for prompt in iter_prompts(source, column, keep_empty=True):
        if not prompt.text:
            num_empty += 1
        elif prompt.text in unique:
            num_duplicates += 1
        else:
            if len(unique) == limit:
                break
            unique[prompt.text] = prompt
    if not unique:
        raise PromptError(f"{source} holds no prompt{without_captions(num_empty)}.")
    return Corpus(tuple(unique.values()), num_duplicates, num_empty)


def without_captions(num_empty: int) -> str:
    """Why a source holds no prompt although it has rows, in words; nothing where it has none."""
    if not num_empty:
        return ""
    return (
        f": the caption column is empty in all of its {num_empty} rows. Name another with --prompt-column, or with "
        "--calibration-column for ordinary captions"
    )


def iter_prompts(source: str | Path, column: str | None = None, keep_empty: bool = False) -> Iterator[Prompt]:
    """The prompts of a source one by one, duplicates too; see :func:`read_corpus`.

    Args:
        source: where they are.
        column: name of the caption column.
        keep_empty: also give a prompt without text for each row that has no caption, to be counted.
    """
    files = _files(str(source))
    if files:
        found = (prompt for file in files for prompt in _read_file(file, column))
    elif _is_dataset_name(str(source)):
        found = _read_dataset(str(source), column)
    else:
        raise PromptError(
            f"There is no prompts file at {source}. Give a file ({FORMATS}), a folder of such files, a pattern, or a "
            "data set of the Hub (owner/name, owner/name:split:column)."
        )
    yield from (prompt for prompt in found if keep_empty or prompt.text)


def near_duplicates(texts: Sequence[str], overlap: float = NEAR_DUPLICATE_OVERLAP) -> list[list[int]]:
    """Group texts that share most of their words.

    Two texts are near-duplicates if the words they share are at least a given share of all their words;
    a chain of near-duplicates is one group.

    Args:
        texts: captions.
        overlap: that share.

    Returns:
        Positions, one list per group, in the order of the first of each.
    """
    words = [frozenset(re.findall(r"\w+", text.casefold())) for text in texts]
    group_of = list(range(len(texts)))

    def first_of(position: int) -> int:
        while group_of[position] != position:
            position = group_of[position]
        return position

    for later, mine in enumerate(words):
        for earlier in range(later):
            common = len(mine & words[earlier])
            if common and common >= overlap * (len(mine) + len(words[earlier]) - common):
                first, second = sorted((first_of(earlier), first_of(later)))
                group_of[second] = first
    groups: dict[int, list[int]] = {}
    for position in range(len(texts)):
        groups.setdefault(first_of(position), []).append(position)
    return list(groups.values())


def _files(source: str) -> list[CaptionFile]:
    path = Path(source)
    if path.is_dir():
        return files_of_folder(path)
    return [CaptionFile(path)] if path.is_file() else files_of_pattern(map(Path, glob.glob(source)))


def _read_file(file: CaptionFile, column: str | None) -> Iterator[Prompt]:
    # Pictures with their captions have no columns that one could name.
    rows = read_rows(file.path, None if file.picture else column)
    yield from _prompts(rows, file.path, None if file.picture else column, file.path.parent, file.picture)


def _prompts(
    rows: Iterable[Row], source: object, column: str | None, folder: Path | None = None, picture: Path | None = None
) -> Iterator[Prompt]:
    """The prompts of rows: the caption column is found in the first.

    Args:
        rows: of one source.
        source: how messages call it.
        column: name of the caption column.
        folder: what paths of images are relative to; None where they lead nowhere.
        picture: the training image of all captions, where the source is the caption of one.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    place = ""
    try:
        name = caption_column(list(first.cells), column)
        for row in chain([first], rows):
            place = f", {row.place}"
            yield from _prompts_of_row(row.cells, _roles(tuple(row.cells), name), folder, picture)
    except TableError as error:
        raise PromptError(f"{source} can't be read{place}: {error}.") from error


@dataclass(frozen=True)
class _Roles:
    """Which columns of a row mean what; None, or nothing, where there is none.

    Attributes:
        caption: the text, or several.
        kind: such as ``VM``.
        images: the training image, the first that names a file counts.
        region: the fixed region of a template.
        others: what travels along.
    """

    caption: str | None
    kind: str | None
    images: tuple[str, ...]
    region: str | None
    others: tuple[str, ...]


# Rows of one source have the same columns, or few different ones.
@lru_cache(maxsize=256)
def _roles(names: tuple[str, ...], caption: str) -> _Roles:
    caption, kind = find_column(names, caption), find_column(names, _KIND_COLUMN)
    images = (find_column(names, name) for name in _IMAGE_COLUMNS)
    return _Roles(
        caption,
        kind if kind != caption else None,
        tuple(name for name in images if name not in (None, caption)),
        find_column(names, _REGION_COLUMN),
        tuple(name for name in names if name.strip() and name not in (caption, kind)),
    )


def _prompts_of_row(
    cells: Mapping[str, object], roles: _Roles, folder: Path | None, picture: Path | None
) -> Iterator[Prompt]:
    image_column, image = _image(cells, roles.images, folder)
    region = _named_file(cells[roles.region], folder) if roles.region is not None else None
    others = {
        name.strip(): text
        for name in roles.others
        if name != image_column
        and (name != roles.region or region is None)
        and (text := plain_text(cells[name])) is not None
    }
    kind = plain_text(cells[roles.kind]) if roles.kind is not None else None
    for text in captions_of(cells[roles.caption] if roles.caption is not None else None):
        yield Prompt(text, kind, picture or image, others, region)


def _image(cells: Mapping[str, object], columns: Sequence[str], folder: Path | None) -> tuple[str | None, Path | None]:
    """The column that names the training image, and its file; neither where there is none on this machine."""
    for name in columns:
        path = _named_file(cells[name], folder)
        # `image` is this program's own column; a `file_name` may be that of a picture which is elsewhere.
        if path is not None and (folded(name) == _IMAGE_COLUMNS[0] or path.is_file()):
            return name, path
    return None, None


def _named_file(value: object, folder: Path | None) -> Path | None:
    """The file that a cell names; None for an address, and where nothing is beside the rows."""
    names = folder is not None and isinstance(value, str) and value.strip() and "://" not in value
    return folder / value.strip() if names else None


# --- data sets of the Hub ---


def _is_dataset_name(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]*){0,2}", source) is not None


def _read_dataset(source: str, column: str | None) -> Iterator[Prompt]:
    """Stream a data set's prompts."""
    # The library takes a second to load and is not needed for local files.
    import datasets

    name, split, named = [*source.split(":"), "", ""][:3]
    try:
        dataset = datasets.load_dataset(name, split=split or "train", streaming=True)
        for column_name, feature in (dataset.features or {}).items():
            if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
                dataset = dataset.remove_columns(column_name)
        rows = (Row(f"row {number}", cells) for number, cells in enumerate(dataset, start=1))
        yield from _prompts(rows, f"The data set {name}", column or named or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise PromptError(
            f"{source} is not a local file, and as a data set of the Hub it can't be read: {error}\n"
            "Check the name and the split (owner/name:split:column); for a private one log in: `hf auth login`."
        ) from error
