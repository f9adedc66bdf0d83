"""Text files and tables of unknown origin: every usual encoding and delimiter, and no cell that is cut or lost."""

import codecs
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase, TextIOWrapper
from itertools import chain

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
# The longer mark first: it begins with the shorter one.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PEEKED = 1024
_EXCEL_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_LONGEST_CELL = 2**30


class TableError(ValueError):
    """What is wrong with a table, where, and how to mend it; its reader knows the file's name."""


@dataclass(frozen=True)
class Table:
    """A table whose header was read.

    Attributes:
        columns: the names of its columns without spaces around them; one can be empty.
        delimiter: what separates its cells.
        rows: the number of the line that a row begins in, and its cells; each row is read when it is asked for.
    """

    columns: tuple[str, ...]
    delimiter: str
    rows: Iterator[tuple[int, tuple[str, ...]]]


def opened_text(file: BufferedIOBase, newline: str | None = None) -> TextIOWrapper:
    """The text of a binary file in the encoding that its first bytes mark: UTF-8 without a mark, UTF-8, 16 or 32.

    Args:
        file: at its beginning.
        newline: as `open` understands it.

    Raises:
        TableError: it is binary, or UTF-16 without a mark.
    """
    first = file.peek(_PEEKED)[:_PEEKED]
    encoding = next((name for mark, name in _MARKS if first.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in first:
        raise TableError("it holds NUL characters, as UTF-16 without a byte order mark does. Save it as UTF-8")
    return TextIOWrapper(file, encoding=encoding, newline=newline)


def open_table(text: TextIOWrapper, is_wanted: Callable[[str], bool]) -> Table:
    """Read the header of a table and find its delimiter.

    The delimiter is the one that gives a wanted column; where none does, the one that splits the header most. Excel's
    first line `sep=;` names it.

    Args:
        text: opened with ``newline=""``, at its beginning.
        is_wanted: whether a column of this name is what the caller looks for.

    Raises:
        TableError: a column is named twice; while rows are read also: a row has more or fewer cells than the header, a
            quote is not closed, or is followed by more text.
    """
    csv.field_size_limit(_LONGEST_CELL)
    header, num_skipped, delimiters = text.readline(), 0, "".join(DELIMITERS)
    if named := _EXCEL_LINE.fullmatch(header):
        header, num_skipped, delimiters = text.readline(), 1, named[1]
    splits = {each: _names(next(csv.reader([header], delimiter=each), [])) for each in delimiters}
    fitting = [each for each, names in splits.items() if any(map(is_wanted, names))]
    delimiter = fitting[0] if fitting else max(splits, key=lambda each: len(splits[each]))
    rows = _rows(chain([header], text), delimiter, num_skipped)
    _, cells = next(rows, (1, ()))
    columns = _names(cells)
    doubled = next((name for name in columns if name and columns.count(name) > 1), None)
    if doubled is not None:
        raise TableError(f"its header names the column `{doubled}` twice. Rename one")
    return Table(columns, delimiter, _checked(rows, columns, delimiter))


def _names(cells: Sequence[str]) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in cells)


def _rows(lines: Iterator[str], delimiter: str, num_skipped: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Rows that are not empty, each with the number of the line that it begins in."""
    # Not strict, a quote that is never closed swallows the rest, and one that is closed too early is left out.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = num_skipped + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise TableError(
                f'its line {line} opens a quote that is not closed as it should: {error}. Close it with `"`; within '
                'quotes, write `""` for each `"` of a caption'
            ) from error
        if cells:
            yield line, tuple(cells)


def _checked(
    rows: Iterator[tuple[int, tuple[str, ...]]], columns: tuple[str, ...], delimiter: str
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Rows with as many cells as the header; a header that stands there again, as in joined files, is left out."""
    needed = max((place + 1 for place, name in enumerate(columns) if name), default=0)
    for line, cells in rows:
        counted = f"its line {line} has {len(cells)} cells, its header {len(columns)}"
        if len(cells) > len(columns):
            raise TableError(
                f"{counted}: is there a {DELIMITERS.get(delimiter, delimiter)} within a caption? Put such captions in "
                'double quotes ("..."), or save the captions as .txt, one per line without a header'
            )
        if len(cells) < needed:
            raise TableError(
                f'{counted}: is a caption broken into two lines? Put such captions in double quotes ("..."), and fill '
                "short rows with empty cells"
            )
        if needed < 2 or _names(cells) != columns:
            yield line, cells
