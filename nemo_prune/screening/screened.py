"""The file that a screening writes: its captions by their value, and what passed."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from nemo_prune.corpus.prompts import Corpus, Prompt, iter_prompts
from nemo_prune.errors import PromptError
from nemo_prune.files.layout import has_ending
from nemo_prune.files.staging import staged_file

PROMPT_COLUMN = "prompt"
PASSED_COLUMN = "passed"
_ROWS_AT_ONCE = 10_000


def caption_table(prompts: Iterable[Prompt]) -> pyarrow.Table:
    """Captions with their type, image and other columns, all as text of any total length."""
    rows = map(_row, prompts)
    pieces = []
    while part := list(islice(rows, _ROWS_AT_ONCE)):
        # Rows of several files need not have the same columns.
        names = dict.fromkeys(name for row in part for name in row)
        pieces.append(
            pyarrow.table(
                {name: pyarrow.array([row.get(name) for row in part], pyarrow.large_string()) for name in names}
            )
        )
    return pyarrow.concat_tables(pieces, promote_options="default")


def write_screened(
    path: Path, captions: pyarrow.Table, order: np.ndarray, columns: Mapping[str, pyarrow.Array]
) -> None:
    """Write captions with their values in one step: at any time the old file or the whole new one is there.

    Args:
        path: a .parquet or .jsonl file.
        captions: see :func:`caption_table`.
        order: places of the captions in the order in which they are written.
        columns: name -> one value per caption; they come after the caption and replace its own columns of that name.
    """
    own = [name for name in captions.column_names if name != PROMPT_COLUMN and name not in columns]
    named = {PROMPT_COLUMN: captions[PROMPT_COLUMN], **columns, **{name: captions[name] for name in own}}
    table = pyarrow.table(named).take(pyarrow.array(order))
    with staged_file(path) as partial:
        if has_ending(path, ".parquet"):
            pyarrow.parquet.write_table(table, partial)
        else:
            with partial.open("w", encoding="utf-8") as file:
                for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())


def read_passed(path: Path, limit: int | None = None) -> Corpus:
    """The captions of a screening that passed, the highest value first.

    Raises:
        PromptError: the file is missing or not made by a screening, or nothing passed.
    """
    passed = tuple(_passed(path))
    if not passed:
        raise PromptError(f"No caption of {path} passed the screening, so there is nothing to localize.")
    return Corpus(passed[:limit], 0)


def _passed(path: Path) -> Iterator[Prompt]:
    if not Path(path).is_file():
        raise PromptError(f"There is no screened file at {path}. `nemo-prune screen` writes one.")
    for prompt in iter_prompts(path, PROMPT_COLUMN):
        if PASSED_COLUMN not in prompt.columns:
            raise PromptError(f"{path} has no column `{PASSED_COLUMN}`. Expected is a file of `nemo-prune screen`.")
        if prompt.columns[PASSED_COLUMN] == str(True):
            yield prompt


def _row(prompt: Prompt) -> dict[str, str | None]:
    # Paths of training images are relative to their own table; this file is elsewhere.
    known = {"type": prompt.kind, "image": str(prompt.image.absolute()) if prompt.image else None}
    return {PROMPT_COLUMN: prompt.text, **{key: value for key, value in known.items() if value}, **prompt.columns}
