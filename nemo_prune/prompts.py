"""Where prompts come from: text files and tables."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_prune.errors import PromptError

CAPTION_COLUMNS = ("Caption", "caption", "prompt", "text")
_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Prompt:
    """A caption to localize.

    Attributes:
        text: the caption.
        kind: what its file's ``type`` column says, such as ``VM``, ``TM`` or ``ordinary``.
        image: the training image that it may give back, where the ``image`` column names a file.
    """

    text: str
    kind: str | None = None
    image: Path | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file, every caption once, in the order of the file.

    Args:
        path: a .txt with one prompt a line, or a .csv or .tsv with any delimiter and a column
            Caption, caption, prompt or text. Columns ``type`` and ``image`` (a path relative to
            the file) travel along, others are ignored.

    Raises:
        PromptError: the file is missing, not UTF-8, has no caption column or holds no prompt.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise PromptError(f"There is no prompts file at {path}.") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8 and try again.") from error
    except OSError as error:
        raise PromptError(f"The prompts file {path} can't be read: {error.strerror}.") from error
    if path.suffix == ".txt":
        prompts = [Prompt(line.strip()) for line in content.splitlines()]
    elif path.suffix in (".csv", ".tsv"):
        prompts = _read_table(content, path)
    else:
        raise PromptError(f"{path} is neither .txt nor .csv. Name it by what it holds.")
    prompts = unique_prompts(prompt for prompt in prompts if prompt.text.strip())
    if not prompts:
        raise PromptError(f"{path} holds no prompt.")
    return prompts


def unique_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Every caption once; the first prompt with it stays."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def _read_table(content: str, path: Path) -> list[Prompt]:
    csv.field_size_limit(2**30)
    header = content.split("\n", 1)[0].rstrip("\r")
    for delimiter in _DELIMITERS:
        columns = next(csv.reader([header], delimiter=delimiter), [])
        caption_column = next((name for name in CAPTION_COLUMNS if name in columns), None)
        if caption_column:
            break
    else:
        raise PromptError(
            f"{path} has no caption column. Its first line is `{header[:200]}`; expected is a column "
            f"named {', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}."
        )
    rows = csv.DictReader(content.splitlines(keepends=True), delimiter=delimiter)
    return [
        Prompt(
            text=row[caption_column] or "",
            kind=row.get("type") or None,
            image=path.parent / row["image"] if row.get("image") else None,
        )
        for row in rows
    ]
