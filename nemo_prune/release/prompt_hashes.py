"""How published files speak of prompts: keyed hashes, which only the work folder can look up."""

import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from nemo_prune.errors import OutputError
from nemo_prune.files.staging import staged_file

_KEY_BYTES = 32


def prompt_references(key: bytes, prompts: Iterable[str]) -> dict[str, str]:
    """Prompt -> HMAC-SHA256 of its text under a secret key, in hexadecimal digits.

    A plain hash would not do: captions are short and alike, and many are public: anyone who hashes a list of
    them would find those that were examined. Without the key no guess can be checked, not even a right one, and
    the references of two captions that differ by one letter have nothing in common.

    Args:
        key: see :func:`secret_key`.
        prompts: texts.
    """
    return {prompt: hmac.digest(key, prompt.encode("utf-8", "surrogatepass"), "sha256").hex() for prompt in prompts}


def secret_key(path: Path) -> bytes:
    """The random key of a work folder; it is made where there is none, and only its owner may read it.

    Args:
        path: where it lies, never in what is published.

    Raises:
        OutputError: the file can't be used.
    """
    try:
        if not path.exists():
            with staged_file(path) as partial, open(partial, "wb", opener=_readable_by_owner) as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise OutputError(f"The key {path} can't be used: {error}") from error
    if len(key) != _KEY_BYTES:
        raise OutputError(
            f"The key {path} has {len(key)} bytes, expected {_KEY_BYTES}. Delete it: a new one is made, and references "
            "in records that were published before can't be looked up any more."
        )
    return key


def _readable_by_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
