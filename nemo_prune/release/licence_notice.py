"""The licence of a release in words, for its card."""

import re
from collections.abc import Mapping

from nemo_prune.release.markdown import code

_OPENRAIL = (
    "This licence restricts uses. Its use-based restrictions go on to apply to whoever uses this model or passes it "
    "on, and have to be passed on with it, together with a copy of the licence and with the notice above that files "
    "were changed."
)
_NO_TEXT = (
    "**No licence text lay beside the base model, so that none lies here.** Where the licence asks for a copy to be "
    "passed on, one has to be put beside this card."
)
_GATED = (
    "The base model is given out only to those who accept its terms. These terms go on to apply here; this card does "
    "not ask for them again."
)


def licence_notice(licence: Mapping) -> str:
    """What is known about the licence, and what is not.

    Args:
        licence: as :meth:`nemo_prune.release.licence.Licence.described` gives it.
    """
    fields = licence["fields"]
    stated = fields["license"]
    names = [stated] if isinstance(stated, str) else stated
    called = " or ".join(code(name) for name in names)
    if fields.get("license_name"):
        called += f" ({code(_joined(fields['license_name']))})"
    texts = [_link(_joined(fields["license_link"]))] if fields.get("license_link") else []
    texts += [_link(name) for name in licence["texts"] if name != fields.get("license_link")]
    parts = [
        {
            "base": f"As the base model's card says: {called}. Its terms go on to apply.",
            "publisher": f"As stated by who made this model: {called}. The base model's card names no licence.",
            "missing": "**Not known.** The base model's card names no licence, and none was stated, so that the "
            f"metadata of this card say {called}. Whoever publishes this model has to state the licence of the base.",
        }[licence["origin"]],
        *([_OPENRAIL] if any("openrail" in name.lower() for name in names) else []),
        f"Licence text: {', '.join(texts)}." if texts else "",
        _NO_TEXT if not licence["texts"] else "",
        _GATED if licence["base_was_gated"] else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _joined(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _link(place: str) -> str:
    """An address or the name of a file as a link, if nothing in it can be anything else."""
    if re.fullmatch(r"https?://[\w./%~#?=&+-]+", place, re.ASCII):
        return f"<{place}>"
    return f"[{code(place)}]({place})" if re.fullmatch(r"\w[\w.-]*", place, re.ASCII) else code(place)
