"""What remains in a release by its own record, and how a card that is published nevertheless says so."""

import re
from collections.abc import Sequence

from nemo_prune.facts import ALL_KINDS
from nemo_prune.release.record import Record

_BEGIN, _END = "<!-- nemo-prune push --allow-residual: begin -->", "<!-- nemo-prune push --allow-residual: end -->"
_SECTION = re.compile(f"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
# Its heading in the card; a card without it gets the section behind its metadata.
_NOT_CLAIMED = re.compile(r"^## What is not claimed$", re.MULTILINE)
_METADATA = re.compile(r"\A---\n.*?^---$", re.MULTILINE | re.DOTALL)


def residual_findings(record: Record) -> list[str]:
    """Why a release should not be published without a word: a sentence each, none where nothing remains.

    Images that were not compared with training images, because none are known, are not a finding: the card says how
    many were.
    """
    measured = record.measured
    if measured is None:
        return ["Nothing was measured on these files: `nemo-prune export` made them from a base and a finished mask."]
    findings = []
    images, unresolved = measured.images.memorized, record.prompts.unresolved
    if (images.copies_after or 0) > 0:
        findings.append(
            f"{images.copies_after:.1%} of the images that were drawn for {images.num_prompts} memorized prompts still "
            "copy a training image after pruning."
        )
    if unresolved > 0:
        findings.append(
            f"{unresolved} memorized prompts stayed unresolved: no set of neurons was found that silences them."
        )
    gone = measured.gone
    if gone.gone < gone.memorized:
        findings.append(
            f"{gone.memorized - gone.gone} of {gone.memorized} memorized prompts are not gone: under the mask their "
            "noise predictions or images still show something of what is memorized."
        )
    if gone.called_up > 0:
        findings.append(
            f"{gone.called_up} of {gone.ordinary} ordinary prompts come to resemble a memorized one under the mask."
        )
    awake = measured.scores.suppressed_above_threshold
    if awake > 0:
        findings.append(
            f"{awake} memorized prompts still give nearly the unpruned model's noise prediction under the mask."
        )
    replication = measured.evidence.replication[ALL_KINDS] if measured.evidence else None
    if replication and replication.candidate.share > 0 and not images.copies_after:
        findings.append(
            f"{replication.candidate.share:.1%} of the images of {replication.captions} memorized captions are copies "
            f"by {measured.evidence.yardstick}."
        )
    if not measured.export_verified:
        findings.append("The exported files were not verified to predict what the suppressed model does.")
    return findings


def with_findings(card: str, findings: Sequence[str]) -> str:
    """A card that says what remains, first among what is not claimed; what it said before is replaced.

    Args:
        card: its text.
        findings: sentences; none take the section out.
    """
    card = _SECTION.sub("", card)
    if not findings:
        return card
    listed = "\n".join(f"> - {finding}" for finding in findings)
    section = f"\n\n{_BEGIN}\n> **Published although something remains:**\n>\n{listed}\n{_END}"
    place = _NOT_CLAIMED.search(card) or _METADATA.search(card)
    end = place.end() if place else 0
    return card[:end] + section + card[end:]
