"""The licence of a release: inherited from the base model, or stated by the publisher; never guessed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from huggingface_hub import metadata_load
from yaml import YAMLError

from nemo_prune.errors import ModelError, SettingsError
from nemo_prune.files.layout import CARD_FILE
from nemo_prune.hub.licence_ids import OTHER, known_licence
from nemo_prune.release.markdown import HUB, code
from nemo_prune.settings import Statement

if TYPE_CHECKING:
    # It loads torch, and reading a card or a record should not wait for that.
    from nemo_prune.models.source import ModelSource

_FIELDS = ("license", "license_name", "license_link")

_OPENRAIL = (
    "This licence restricts uses. Its use-based restrictions also apply to everyone who uses this model or passes it "
    "on, and have to be passed on with it, together with a copy of the licence and with the notice above that files "
    "were changed."
)
_NO_TEXT = (
    "**No licence text lay beside the base model, so there is none here.** Where the licence asks for a copy to be "
    "passed on, one has to be put beside this card."
)
_GATED = (
    "The base model is given out only to those who accept its terms. These terms also apply here; this card does "
    "not ask for them again."
)


@dataclass(frozen=True)
class Licence:
    """What is known about the licence of a base model.

    Attributes:
        fields: ``license``, ``license_name`` and ``license_link`` for the metadata of a card.
        origin: who said so: the ``base`` model's card, the ``publisher``, or nobody: ``missing``.
        texts: names of the licence texts that lie beside the base and are copied.
        base_was_gated: whether the base's card asks for consent to its terms.
    """

    fields: Mapping[str, str | list[str]]
    origin: Literal["base", "publisher", "missing"]
    texts: tuple[str, ...] = ()
    base_was_gated: bool = False

    def warnings(self) -> list[str]:
        """What a publisher has to see to before publication."""
        warnings = []
        if self.origin == "missing":
            warnings.append(
                "The base model's card names no licence, so the release's card says `other`. State it: --license ID."
            )
        if not self.texts:
            warnings.append(
                "No licence text is beside the base model, so there is none in the release. If the licence asks "
                "for a copy to be passed on, put one there before you publish."
            )
        return warnings


def licence_of(source: "ModelSource", statement: Statement) -> Licence:
    """The licence that a release of this base has.

    Args:
        source: the base model; its card and the files beside it are read.
        statement: what the publisher states.

    Raises:
        SettingsError: the publisher states another licence than the base's card.
        ModelError: the base's card can't be read.
    """
    card = _card_metadata(source.folder / CARD_FILE)
    texts = source.files.licence_texts
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
    return Licence(fields or {"license": OTHER}, origin, texts, gated)


def _card_metadata(path: Path) -> dict[str, object]:
    """The metadata of a card; nothing where there is no card, or none in it.

    Raises:
        ModelError: they can't be read, so that nobody knows what they say.
    """
    if not path.is_file():
        return {}
    try:
        metadata = metadata_load(path)
        if metadata is None and re.match(r"\s*---\s*\n", path.read_text(encoding="utf-8-sig")):
            raise ValueError("they have no end: a line `---` has to close them")
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())
        raise ModelError(
            f"The metadata of the base model's card, {path.name}, can't be read: {why}. They may name its licence, "
            "which goes on to apply. Mend them, or fetch the card anew."
        ) from error
    return {name: value for name, value in (metadata or {}).items() if isinstance(name, str)}


def _inherited_fields(
    card: Mapping[str, object], source: "ModelSource", texts: tuple[str, ...]
) -> dict[str, str | list[str]]:
    """The licence fields of a base's card; without a licence its name and link say nothing.

    Raises:
        ModelError: the card's licence is not a text.
    """
    fields = {name: value for name in _FIELDS if (value := _plain(card.get(name)))}
    if "license" not in fields:
        if card.get("license"):
            raise ModelError(
                f"The base model's card says license: {card['license']}, expected is an identifier such as mit. Mend "
                "the card."
            )
        return {}
    fields = _as_the_hub_knows(fields)
    link = fields.get("license_link")
    if isinstance(link, str) and "://" not in link and link not in texts:
        # It would lead nowhere here.
        del fields["license_link"]
        if source.repo_id:
            fields["license_link"] = f"{HUB}/{source.repo_id}/blob/{source.commit}/{quote(link)}"
    return fields


def _as_the_hub_knows(fields: Mapping[str, str | list[str]]) -> dict[str, str | list[str]]:
    """Fields that the Hub accepts: what it does not know by an identifier is `other`, with a name."""
    stated = fields["license"]
    names = [stated] if isinstance(stated, str) else stated
    unknown = [name for name in names if known_licence(name) is None]
    known = list(dict.fromkeys(known_licence(name) or OTHER for name in names))
    named = {"license_name": "-or-".join(map(_as_identifier, unknown))} if unknown else {}
    return named | dict(fields) | {"license": known[0] if isinstance(stated, str) else known}


def _as_identifier(name: str) -> str:
    """A licence's name with the characters that names of licences have on the Hub."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unnamed"


def _plain(value: object) -> str | list[str] | None:
    """A field's text on one line, or a list of such; None for what is neither."""
    if isinstance(value, list):
        return [text for each in value if isinstance(text := _plain(each), str)] or None
    if not isinstance(value, str):
        return None
    return "".join(char for char in " ".join(value.split()) if char.isprintable()) or None


def licence_notice(licence: Licence) -> str:
    """What is known about a licence, and what is not, in words for a card."""
    fields = licence.fields
    stated = fields["license"]
    names = [stated] if isinstance(stated, str) else stated
    called = " or ".join(code(name) for name in names)
    if fields.get("license_name"):
        called += f" ({code(_joined(fields['license_name']))})"
    texts = [_link(_joined(fields["license_link"]))] if fields.get("license_link") else []
    texts += [_link(name) for name in licence.texts if name != fields.get("license_link")]
    parts = [
        {
            "base": f"As the base model's card says: {called}. Its terms also apply here.",
            "publisher": f"As stated by who made this model: {called}. The base model's card names no licence.",
            "missing": "**Not known.** The base model's card names no licence, and none was stated, so the "
            f"metadata of this card say {called}. The publisher of this model has to state the licence of the base.",
        }[licence.origin],
        *([_OPENRAIL] if any("openrail" in name.lower() for name in names) else []),
        f"Licence text: {', '.join(texts)}." if texts else "",
        _NO_TEXT if not licence.texts else "",
        _GATED if licence.base_was_gated else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _joined(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _link(place: str) -> str:
    """An address or the name of a file as a link, if nothing in it can be anything else."""
    if re.fullmatch(r"https?://[\w./%~#?=&+-]+", place, re.ASCII):
        return f"<{place}>"
    return f"[{code(place)}]({place})" if re.fullmatch(r"\w[\w.-]*", place, re.ASCII) else code(place)
