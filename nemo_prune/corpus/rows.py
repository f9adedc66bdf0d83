"""Rows of caption files, each with its place, and what their cells say as text."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

from nemo_prune.errors import PromptError
from nemo_prune.files.tables import TableError, open_table, opened_text

CAPTION_COLUMNS = ("caption", "prompt", "text")
# What trainers put beside a picture under its name.
BESIDE_PICTURES = (".txt", ".caption")
_LONGEST_LIST = 200
_NAME_IT = "Name the column with --prompt-column, or with --calibration-column for ordinary captions"
FORMATS = ".txt, .csv, .tsv, .json, .jsonl or .parquet, each also as .gz"


@dataclass(frozen=True)
class Row:
    """A row of a source.

    Attributes:
        place: where it is, for messages: ``line 3`` of a file.
        cells: column -> value of any type.
    """

    place: str
    cells: Mapping[str, object]


def is_caption_file(path: Path) -> bool:
    """Whether captions can be read from a file, by its name."""
    return _kind(path) in _READERS


def read_rows(path: Path, column: str | None) -> Iterator[Row]:
    """The rows of a caption file.

    Args:
        path: the file.
        column: name of the caption column, which a text file does not have; None for the usual names.

    Raises:
        PromptError: the file is damaged, or not of a known format.
    """
    kind = _kind(path)
    if kind not in _READERS:
        raise PromptError(f"{path} is none of {FORMATS}. Name it by what it holds.")
    is_packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
            if not is_packed and file.peek(2)[:2] == b"\x1f\x8b":
                raise PromptError(f"{path} is packed with gzip. Name it so: {path.name}.gz")
            yield from _READERS[kind](file, column)
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} is not UTF-8{_first_undecodable(path, is_packed)}. Is it Windows-1252, as Excel saves CSV? Save "
            "it as `CSV UTF-8` and try again."
        ) from error
    except TableError as error:
        raise PromptError(f"{path} can't be read: {error}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise PromptError(f"The prompts file {path} can't be read: {error}. Fetch or save it anew.") from error


def caption_column(names: Sequence[str], wanted: str | None) -> str:
    """The column of the captions among those of a source.

    Args:
        names: the columns.
        wanted: its name; None for the usual ones.

    Raises:
        TableError: there is none, or there are several.
    """
    if wanted is not None:
        found = _only_column(names, wanted)
        if found is None:
            raise TableError(f"it has no column `{wanted}`. It has: {_shown(names)}")
        return found
    found = next((column for name in CAPTION_COLUMNS if (column := _only_column(names, name)) is not None), None)
    if found is None:
        raise TableError(
            f"it has no caption column. It has: {_shown(names)}; expected is one named "
            f"{', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}. {_NAME_IT}"
        )
    return found


def find_column(names: Sequence[str], wanted: str) -> str | None:
    """The column of a name: this very one, or the first that differs in case or in spaces around it."""
    if wanted in names:
        return wanted
    return next((name for name in names if folded(name) == folded(wanted)), None)


def _only_column(names: Sequence[str], wanted: str) -> str | None:
    alike = [name for name in names if folded(name) == folded(wanted)]
    if len(alike) > 1 and wanted not in alike:
        raise TableError(f"it has the columns {' and '.join(f'`{name}`' for name in alike)}. {_NAME_IT}")
    return find_column(names, wanted)


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names))
    return shown if len(shown) <= _LONGEST_LIST else f"{shown[:_LONGEST_LIST]}..."


def folded(name: object) -> str:
    """A column's name without case and without spaces around it."""
    return str(name).strip().casefold()


def captions_of(value: object) -> list[str]:
    """The captions of a cell: one of a text, several of a list; an empty one for what is missing.

    Raises:
        TableError: it is not text.
    """
    if isinstance(value, list | tuple):
        texts = [_caption(each) for each in value]
        return [text for text in texts if text] or [""]
    return [_caption(value)]


def plain_text(value: object) -> str | None:
    """A cell beside the caption as text; None for what is missing or is neither text nor a number."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str | int | float) or _is_missing(value):
        return None
    return encodable(str(value)) or None


def encodable(text: str) -> str:
    """Text that can be written: JSON can hold halves of characters, which become ``?``."""
    return text.encode(errors="replace").decode()


def _caption(value: object) -> str:
    if _is_missing(value):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TableError(f"its caption is bytes that are not UTF-8 (byte {error.start})") from error
    if not isinstance(value, str):
        shown = repr(value)
        raise TableError(
            f"its caption is not text but {type(value).__name__}: {shown[:60]}{'...' if len(shown) > 60 else ''}. "
            f"{_NAME_IT}"
        )
    if "\0" in value:
        raise TableError("its caption holds a NUL character. Is the source damaged, or UTF-16?")
    # A caption is the same one with the line breaks of Windows; a byte order mark is left of files that were joined.
    return encodable(value).replace("\r\n", "\n").replace("\r", "\n").strip().strip("\ufeff").strip()


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and isnan(value))


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kinds = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    return kinds[0] if kinds else None


def _first_undecodable(path: Path, is_packed: bool) -> str:
    """In which line of a text file the first byte stands that is not UTF-8, in words."""
    if _kind(path) == ".parquet":
        return ""
    with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f": see line {number}, byte {line[error.start : error.start + 1]!r}"
    return ""


# --- one function per format ---


def _text_rows(file: io.BufferedIOBase, column: str | None) -> Iterator[Row]:
    name = column or CAPTION_COLUMNS[0]
    for number, line in enumerate(opened_text(file), start=1):
        if line.strip():
            yield Row(f"line {number}", {name: line})


def _table_rows(file: io.BufferedIOBase, column: str | None) -> Iterator[Row]:
    wanted = {folded(column)} if column else set(CAPTION_COLUMNS)
    table = open_table(opened_text(file, newline=""), lambda name: folded(name) in wanted)
    if table.columns:
        # What is wrong with the header is told before what is wrong with a row.
        caption_column(table.columns, column)
    for line, cells in table.rows:
        yield Row(f"line {line}", dict(zip(table.columns, cells, strict=False)))


def _json_rows(file: io.BufferedIOBase, column: str | None) -> Iterator[Row]:
    """One object per line, or one array of objects; texts in their place are captions."""
    text, name = opened_text(file), column or CAPTION_COLUMNS[0]
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            items = _parsed(line + text.read(), f"its array from line {number}")
            places = (f"item {place}" for place in range(1, len(items) + 1))
            yield from (_json_row(item, place, name) for item, place in zip(items, places, strict=True))
            return
        yield _json_row(_parsed(line, f"its line {number}"), f"line {number}", name)


def _json_row(item: object, place: str, name: str) -> Row:
    if isinstance(item, str):
        return Row(place, {name: item})
    if not isinstance(item, dict):
        raise TableError(f"its {place} is not a JSON object. Expected is one per line, or one array of them")
    return Row(place, item)


def _parsed(text: str, place: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        why = error if isinstance(error, ValueError) else "it is nested too deeply"
        raise TableError(
            f"{place} is not valid JSON: {why}. Expected is one object per line, or one array of them"
        ) from error


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        raise ValueError("a key stands twice")
    return parsed


def _parquet_rows(file: io.BufferedIOBase, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A packed file can't be read from its end, where parquet has its index.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        names = table.schema_arrow.names
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise TableError(f"it has two columns `{doubled}`. Rename one")
        number = 0
        for batch in table.iter_batches():
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", cells)
    except pyarrow.ArrowException as error:
        raise TableError(f"it is not valid parquet: {error}") from error


_READERS: dict[str, Callable[[io.BufferedIOBase, str | None], Iterator[Row]]] = {
    **dict.fromkeys(BESIDE_PICTURES, _text_rows),
    **dict.fromkeys((".csv", ".tsv"), _table_rows),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_rows),
    ".parquet": _parquet_rows,
}
