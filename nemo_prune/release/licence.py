"""The licence of a release: inherited from the base model, or stated by who publishes; never guessed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from huggingface_hub import metadata_load
from yaml import YAMLError

from nemo_prune.errors import SettingsError
from nemo_prune.files.layout import CARD_FILE, is_licence_file
from nemo_prune.models.source import ModelSource
from nemo_prune.release.markdown import HUB
from nemo_prune.settings import Statement

_FIELDS = ("license", "license_name", "license_link")
_NO_LICENCE = "other"


@dataclass(frozen=True)
class Licence:
    """What is known about the licence of a base model.

    Attributes:
        fields: ``license``, ``license_name`` and ``license_link`` for the metadata of a card.
        origin: who said so: the ``base`` model's card, the ``publisher``, or nobody: ``missing``.
        texts: names of the licence texts that lie beside the base and are copied.
        base_was_gated: whether the base's card asks for consent to its terms.
    """

    fields: dict[str, str | list[str]]
    origin: Literal["base", "publisher", "missing"]
    texts: tuple[str, ...] = ()
    base_was_gated: bool = False

    def described(self) -> dict:
        """For the record, as JSON values."""
        return {
            "fields": self.fields,
            "origin": self.origin,
            "texts": list(self.texts),
            "base_was_gated": self.base_was_gated,
        }

    def warnings(self) -> list[str]:
        """What a publisher has to see to before publication."""
        warnings = []
        if self.origin == "missing":
            warnings.append(
                "The base model's card names no licence, so that the release's says `other`. State it: --license ID."
            )
        if not self.texts:
            warnings.append(
                "No licence text lies beside the base model, so that none lies in the release. Where the licence asks "
                "for a copy to be passed on, put one there before you publish."
            )
        return warnings


def licence_of(source: ModelSource, statement: Statement) -> Licence:
    """The licence that a release of this base has.

    Args:
        source: the base model; its card and the files beside it are read.
        statement: what the publisher states.

    Raises:
        SettingsError: the publisher states another licence than the base's card.
    """
    card = _card_metadata(source.folder / CARD_FILE)
    texts = tuple(
        sorted(path.name for path in source.folder.iterdir() if path.is_file() and is_licence_file(path.name))
    )
    inherited = _inherited_fields(card, source, texts)
    stated = {name: getattr(statement, name) for name in _FIELDS if getattr(statement, name)}
    for name, value in stated.items():
        if inherited.get(name, value) not in (value, [value]):
            raise SettingsError(
                f"The base model's card says {name}: {inherited[name]}, and --{name.replace('_', '-')} says {value}. "
                "The licence of a base goes on to apply to what is made of it: leave the option out."
            )
    fields = stated | inherited
    origin = "base" if inherited else "publisher" if stated else "missing"
    gated = any(name.startswith("extra_gated_") for name in card)
    return Licence(fields or {"license": _NO_LICENCE}, origin, texts, gated)


def _card_metadata(path: Path) -> dict[str, object]:
    """The metadata of a card; nothing where there is none or it can't be read."""
    if not path.is_file():
        return {}
    try:
        metadata = metadata_load(path)
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}
    return {name: value for name, value in (metadata or {}).items() if isinstance(name, str)}


def _inherited_fields(
    card: Mapping[str, object], source: ModelSource, texts: tuple[str, ...]
) -> dict[str, str | list[str]]:
    """The licence fields of a base's card; without a licence its name and link say nothing."""
    fields = {name: value for name in _FIELDS if (value := _plain(card.get(name)))}
    if "license" not in fields:
        return {}
    link = fields.get("license_link")
    if isinstance(link, str) and "://" not in link and link not in texts:
        # It would lead nowhere here.
        del fields["license_link"]
        if source.repo_id:
            fields["license_link"] = f"{HUB}/{source.repo_id}/blob/{source.commit}/{quote(link)}"
    return fields


def _plain(value: object) -> str | list[str] | None:
    """A field's text on one line, or a list of such; None for what is neither."""
    if isinstance(value, list):
        return [text for each in value if isinstance(text := _plain(each), str)] or None
    if not isinstance(value, str):
        return None
    return "".join(char for char in " ".join(value.split()) if char.isprintable()) or None
