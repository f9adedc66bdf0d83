"""Where prompts come from: text files, tables and data sets of the Hub."""

import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from nemo_prune.errors import PromptError

CAPTION_COLUMNS = ("Caption", "caption", "prompt", "text")
NEAR_DUPLICATE_OVERLAP = 0.5
_DELIMITERS = ",;\t|"
_FORMATS = ".txt, .csv, .tsv, .jsonl or .parquet, each also as .gz"
MOST_PROMPTS_COMPARED = 20_000

Row = Mapping[str, object]


@dataclass(frozen=True)
class Prompt:
    """A caption to localize.

    Attributes:
        text: the caption.
        kind: what its file's ``type`` column says, such as ``VM``, ``TM`` or ``ordinary``.
        image: the training image that it may give back, where the ``image`` column names a file. An address
            (``https://...``) stays among the columns: nothing is fetched when prompts are read.
        columns: the other columns of its row, as text.
        region: the fixed region of a template, where the ``mask`` column names a black and white picture.
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
    """

    prompts: tuple[Prompt, ...]
    num_duplicates: int

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
        source: a local file: .txt with one prompt a line; .csv or .tsv with any delimiter, .jsonl or
            .parquet with a caption column; each also as .gz. A pattern such as ``captions/*.jsonl``
            takes several. Or a data set of the Hub: ``owner/name``, ``owner/name:split`` or
            ``owner/name:split:column``.
        column: name of the caption column; Caption, caption, prompt or text unless given. Columns
            ``type``, ``image`` and ``mask`` (paths relative to the file) are understood, others travel along.
        limit: take the first so many prompts only.

    Raises:
        PromptError: the source is missing, damaged, has no caption column or holds no prompt.
    """
    unique: dict[str, Prompt] = {}
    num_duplicates = 0
    for prompt in iter_prompts(source, column):
        if prompt.text in unique:
            num_duplicates += 1
        else:
            if len(unique) == limit:
                break
            unique[prompt.text] = prompt
    if not unique:
        raise PromptError(f"{source} holds no prompt.")
    return Corpus(tuple(unique.values()), num_duplicates)


def iter_prompts(source: str | Path, column: str | None = None) -> Iterator[Prompt]:
    """The prompts of a source one by one, duplicates too; see :func:`read_corpus`."""
    files = _files(str(source))
    if files:
        found = (prompt for file in files for prompt in _read_file(file, column))
    elif _is_dataset_name(str(source)):
        found = _read_dataset(str(source), column)
    else:
        raise PromptError(
            f"There is no prompts file at {source}. Give a file ({_FORMATS}), a pattern, or a data set of the Hub "
            "(owner/name, owner/name:split:column)."
        )
    yield from (prompt for prompt in found if prompt.text)


def near_duplicates(texts: Sequence[str], overlap: float = NEAR_DUPLICATE_OVERLAP) -> list[list[int]]:
    """Group texts that share most of their words.

    Two texts are near-duplicates when the words that both have are at least a share of the words
    that either has; a chain of them is one group.

    Args:
        texts: captions.
        overlap: that share.

    Returns:
        Positions, a list a group, in the order of the first of each.
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


# --- files ---


def _files(source: str) -> list[Path]:
    if Path(source).is_file():
        return [Path(source)]
    return sorted(path for path in map(Path, glob.glob(source)) if path.is_file())


def _read_file(path: Path, column: str | None) -> Iterator[Prompt]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2:-1] if packed else suffixes[-1:]
    readers = {".txt": _text_rows, ".csv": _table_rows, ".tsv": _table_rows, ".jsonl": _json_rows,
               ".parquet": _parquet_rows}  # fmt: skip
    if not kind or kind[0] not in readers:
        raise PromptError(f"{path} is none of {_FORMATS}. Name it by what it holds.")
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield from _prompts(readers[kind[0]](file, path, column), path, column)
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8 and try again.") from error
    except (OSError, EOFError) as error:
        raise PromptError(f"The prompts file {path} can't be read: {error}.") from error


def _prompts(rows: Iterable[Row], source: object, column: str | None) -> Iterator[Prompt]:
    """The prompts of rows: the caption column is found in the first."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    name = _caption_column(list(first), source, column)
    folder = source.parent if isinstance(source, Path) else None
    for row in chain([first], rows):
        files = {key: folder / value for key in ("image", "mask") if folder and _names_a_file(value := row.get(key))}
        others = {key: _text(value) for key, value in row.items()
                  if key and key not in (name, "type", *files) and isinstance(value, str | int | float)}  # fmt: skip
        yield Prompt(
            text=_text(row.get(name) or "").strip(),
            kind=_text(row["type"]) if row.get("type") else None,
            image=files.get("image"),
            columns=others,
            region=files.get("mask"),
        )


def _names_a_file(value: object) -> bool:
    """Whether a column holds a path, and not an address or nothing."""
    return isinstance(value, str) and value != "" and "://" not in value


def _text(value: object) -> str:
    """As text that can be written: JSON can hold halves of characters, which become ``?``."""
    return str(value).encode(errors="replace").decode()


def _caption_column(columns: Sequence[str], source: object, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise PromptError(f"{source} has no column `{wanted}`. It has: {', '.join(map(str, columns))}.")
        return wanted
    found = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if found is None:
        raise PromptError(
            f"{source} has no caption column. It has: {', '.join(map(str, columns))[:200]}; expected is one named "
            f"{', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}. Name another with --prompt-column."
        )
    return found


def _text_rows(file: io.BufferedIOBase, path: Path, column: str | None) -> Iterator[Row]:
    name = column or CAPTION_COLUMNS[0]
    for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
        yield {name: line.strip()}


def _table_rows(file: io.BufferedIOBase, path: Path, column: str | None) -> Iterator[Row]:
    csv.field_size_limit(2**30)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    header = text.readline()
    names = {column} if column else set(CAPTION_COLUMNS)
    splits = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    fitting = next((delimiter for delimiter, columns in splits.items() if names & set(columns)), None)
    if fitting is None:
        # The delimiter that splits it most is the likely one.
        _caption_column(max(splits.values(), key=len), path, column)
    yield from csv.DictReader(text, fieldnames=splits[fitting], delimiter=fitting)


def _json_rows(file: io.BufferedIOBase, path: Path, column: str | None) -> Iterator[Row]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PromptError(f"Line {number} of {path} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise PromptError(f"Line {number} of {path} is no JSON object. Expected is one a line, with a caption.")
            yield row


def _parquet_rows(file: io.BufferedIOBase, path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A packed file can't be read from its end, where parquet has its index.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file)
        for batch in table.iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise PromptError(f"{path} can't be read as parquet: {error}") from error


# --- data sets of the Hub ---


def _is_dataset_name(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]*){0,2}", source) is not None


def _read_dataset(source: str, column: str | None) -> Iterator[Prompt]:
    """Stream a data set's prompts."""
    # The library takes a second to load and is of no use for local files.
    import datasets

    name, split, named = [*source.split(":"), "", ""][:3]
    column = column or named or None
    try:
        dataset = datasets.load_dataset(name, split=split or "train", streaming=True)
        for feature in (dataset.features or {}).items():
            if isinstance(feature[1], datasets.Image):
                dataset = dataset.remove_columns(feature[0])
        yield from _prompts(dataset, f"The data set {name}", column)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise PromptError(
            f"{source} is no local file, and as a data set of the Hub it can't be read: {error}\n"
            "Check the name and the split (owner/name:split:column); for a private one log in: `hf auth login`."
        ) from error
