"""More captions than memory holds: read again in every pass, every caption once, some with labels."""

from collections.abc import Callable, Iterator
from hashlib import blake2b, sha256
from itertools import compress

from nemo_prune.corpus.prompts import Prompt, without_captions
from nemo_prune.corpus.rows import find_column, folded
from nemo_prune.errors import PromptError

ORDINARY = "ordinary"
_MEMORIZED_LABELS = {"vm": "VM", "tm": "TM", "mv": "MV", "tv": "TV", "rv": "RV"} | dict.fromkeys(
    ("1", "1.0", "true", "yes", "y", "memorized", "memorised", "mem"), "memorized"
)
_ORDINARY_LABELS = ("0", "0.0", "false", "no", "n", "none", "ordinary", "normal", "not memorized", "not_memorized")


class CaptionStream:
    """The captions of a source, each once, in their order.

    The first pass is made at once: it counts, and keeps eight bytes a caption to tell duplicates, which are let
    go afterwards; what stays is one byte per row.

    Args:
        read: starts to read the source from its beginning; a prompt without text stands for a row without a caption.
        limit: take the first so many captions only.
        label_column: the column that says which captions are memorized.

    Attributes:
        num_prompts: how many different captions there are.
        num_duplicates: how many more were exactly the same as one of them.
        num_empty: how many rows had no caption.
        digest: sha256 over the captions in their order.
        kinds: None without a label column; else one kind per caption: `ordinary`, VM, TM, memorized, or None without a
            label.

    Raises:
        PromptError: there is no caption, or a label that is not understood.
    """

    def __init__(
        self, read: Callable[[], Iterator[Prompt]], limit: int | None = None, label_column: str | None = None
    ) -> None:
        self._read = read
        self._kept = bytearray()
        self.num_prompts = self.num_duplicates = self.num_empty = 0
        self.kinds: list[str | None] | None = None if label_column is None else []
        known: set[int] = set()
        digest = sha256()
        for prompt in read():
            short = int.from_bytes(blake2b(prompt.text.encode(), digest_size=8).digest(), "little")
            is_new = bool(prompt.text) and short not in known
            if is_new and self.num_prompts == limit:
                break
            self._kept.append(is_new)
            if is_new:
                known.add(short)
                digest.update(prompt.text.encode() + b"\0")
                self.num_prompts += 1
                if self.kinds is not None:
                    self.kinds.append(kind_of(prompt, label_column))
            elif prompt.text:
                self.num_duplicates += 1
            else:
                self.num_empty += 1
        if not self.num_prompts:
            raise PromptError(f"The source of captions holds no prompt{without_captions(self.num_empty)}.")
        if self.kinds is not None and not any(self.kinds):
            raise PromptError(f"No caption has a label in the column `{label_column}`. Name another: --label-column.")
        self.digest = digest.hexdigest()

    def __iter__(self) -> Iterator[Prompt]:
        digest = sha256()
        # Values are kept by position alone, so a source that changed meanwhile must be noticed.
        for prompt in compress(self._read(), self._kept):
            digest.update(prompt.text.encode() + b"\0")
            yield prompt
        if digest.hexdigest() != self.digest:
            raise PromptError("The source of captions changed while it was read. Run the command again.")


def kind_of(prompt: Prompt, label_column: str) -> str | None:
    """What a prompt's label says: `ordinary`, or which kind of memorized; None without a label.

    Raises:
        PromptError: the label is not understood.
    """
    column = find_column(tuple(prompt.columns), label_column)
    label = prompt.kind if folded(label_column) == "type" else prompt.columns.get(column)
    word = (label or "").strip().casefold()
    if not word:
        return None
    if word in _ORDINARY_LABELS:
        return ORDINARY
    if word not in _MEMORIZED_LABELS:
        raise PromptError(
            f"The label `{label}` in the column `{label_column}` is not understood. Memorized captions are marked "
            f"{', '.join(_MEMORIZED_LABELS)}; ordinary ones {', '.join(_ORDINARY_LABELS)}."
        )
    return _MEMORIZED_LABELS[word]
