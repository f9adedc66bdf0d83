"""Pieces of Markdown in which text from elsewhere stays text."""

import re
import unicodedata
from collections.abc import Sequence

HUB = "https://huggingface.co"

_LONGEST = 300
_INVISIBLE = ("Cc", "Cf", "Cs")


def code(text: str) -> str:
    """Untrusted text, such as a caption or a name, as one span of code.

    Nothing in a code span is Markdown, HTML or an address to link to, so no list of characters has to be
    complete. White space becomes one space; control characters, what turns the direction of the text or can't
    be seen, and lone surrogates become U+FFFD; what is very long is cut.

    Args:
        text: anything.
    """
    flat = " ".join(text.split())
    shown = "".join("\ufffd" if unicodedata.category(char) in _INVISIBLE else char for char in flat)
    shown = shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    # A renderer takes one space away on both sides, and needs them beside a backtick.
    padding = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{padding}{shown or ' '}{padding}{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; a ``|`` in a cell is shown as ``¦``, because renderers do not agree on how to escape it in code."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "¦") for cell in line) + " |" for line in lines)


def number(value: float | None) -> str:
    """Three decimals, nothing where there is no value."""
    return "" if value is None else f"{value:.3f}"


def share(value: float | None) -> str:
    """A share in percent, nothing where there is no value."""
    return "" if value is None else f"{value:.1%}"
