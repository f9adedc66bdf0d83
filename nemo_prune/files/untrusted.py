"""Text of unknown origin: JSON that is parsed strictly, and names made safe for a terminal."""

import json
from pathlib import Path

# As safetensors bounds its header; the largest JSON of a model, a tokenizer, takes a tenth.
MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 64


def parse_json(content: bytes) -> object:
    """Parse UTF-8 JSON; reject duplicate keys and nesting deeper than 64 levels.

    Raises:
        ValueError: it is not such JSON.
    """
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [parsed]
    for _ in range(_MAX_DEPTH):
        level = [inner for each in level for inner in _inside(each)]
    if level:
        raise ValueError("it is nested too deeply")
    return parsed


def read_json(path: Path) -> object:
    """Parse a file, see :func:`parse_json`; pipes, devices and overlong files are not read.

    Raises:
        ValueError: it is not such JSON.
        OSError: it can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not a file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes")
    return parse_json(path.read_bytes())


def printable(text: str) -> str:
    """Text for a terminal: characters that would control it, or hide something, are spelled out."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        raise ValueError("a key appears twice")
    return parsed


def _inside(value: object) -> list:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
