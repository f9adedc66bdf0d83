"""The evidence in words: a verdict, rows for card, terminal and report, and limits that are broken."""

from collections.abc import Sequence

from nemo_prune.proof.drawing import CANDIDATE
from nemo_prune.proof.evidence import EvidenceSummary
from nemo_prune.proof.intervals import GroupedShare, Spread
from nemo_prune.proof.replication import KindReplication
from nemo_prune.proof.utility import PRECISION, RANDOM
from nemo_prune.release.wording import counted

Row = tuple[str, str, str]


def verdict(summary: EvidenceSummary) -> str:
    """One paragraph: what comes back, what an attack brings back, and what the candidate still can do."""
    everything = summary.replication.everything
    sentences = [
        f"{_of(everything.captions, everything.of, 'memorized caption')} drawn: "
        f"{_percent(everything.base.copies.share)} of the base's images are copies, and "
        f"{_percent(everything.candidate.copies.share)} of the candidate's "
        f"({_interval(everything.candidate.copies)} by groups of near-duplicates)."
    ]
    if everything.by_training_image < everything.captions:
        sentences.append(
            f"For {everything.captions - everything.by_training_image} of them no training image is known: there the "
            "base's own images of other seeds stand in."
        )
    sentences += _attack_sentences(summary)
    if summary.utility is not None:
        loss = f"On captions held out, its noise prediction differs from the base's by {_percent(summary.utility.loss)}"
        baselines = [
            f"{name} {_percent(summary.utility.held_out.loss(key))}"
            for key, name in ((RANDOM, "as many random neurons"), (PRECISION, "another precision"))
            if key in summary.utility.held_out.relative_error
        ]
        sentences.append(f"{loss} ({'; '.join(baselines)}).")
    return " ".join(sentences)


def replication_rows(summary: EvidenceSummary) -> list[Row]:
    """What comes back, by type: name, base, candidate."""
    kinds = summary.replication.by_kind
    rows = [row for name, kind in kinds.items() for row in _kind_rows(name, kind)]
    return rows + (_kind_rows("all", summary.replication.everything) if len(kinds) > 1 else [])


def utility_rows(summary: EvidenceSummary) -> list[tuple[str, str]]:
    """What the candidate still can do, beside what differs anyway."""
    utility = summary.utility
    if utility is None:
        return []
    rows = [(f"noise prediction, {utility.held_out.captions} held-out captions", _percent(utility.loss))]
    rows += [
        (f"the same, {name}", _percent(utility.held_out.loss(name)))
        for name in utility.held_out.relative_error
        if name != CANDIDATE
    ]
    if utility.neighbours is not None:
        rows.append(
            (f"noise prediction, {utility.neighbours.captions} neighbours of memorized captions",
             _percent(utility.neighbours.loss()))
        )  # fmt: skip
    if utility.equivalence is not None:
        test = utility.equivalence
        holds = "equivalent" if test.holds else "not shown to be equivalent"
        rows.append(
            (f"{test.what}: within ±{test.margin:.2g}",
             f"{test.mean:+.3f} ({test.low:+.3f} to {test.high:+.3f}), {holds}, p = {test.p_value:.2g}")
        )  # fmt: skip
    if utility.images_to_base is not None:
        rows.append(("images of held-out captions to the base's, same seed", _spread(utility.images_to_base)))
    if utility.images_random is not None:
        rows.append(("the same, as many random neurons", _spread(utility.images_random)))
    if utility.images_between_seeds is not None:
        rows.append(("the same, the base's own two seeds", _spread(utility.images_between_seeds)))
    for name, spread in (utility.alignment or {}).items():
        rows.append((f"caption and image by CLIP, {name}", _spread(spread)))
    if utility.alignment_equivalence is not None:
        holds = "equivalent" if utility.alignment_equivalence.holds else "not shown to be equivalent"
        rows.append((utility.alignment_equivalence.what, f"{utility.alignment_equivalence.mean:+.3f}, {holds}"))
    rows += [(f"{name} of the candidate's images to the base's", f"{value:.3f}")
             for name, value in (utility.distances or {}).items()]  # fmt: skip
    return rows


def attack_rows(summary: EvidenceSummary) -> list[tuple[str, str, str, str, str]]:
    """Attacks: model, target, start, how many came back, median steps."""
    return [
        (
            each.model,
            "memorized" if each.memorized else "never trained on",
            each.start,
            counted(each.came_back),
            f"{each.median_steps:g}" if each.median_steps is not None else f"more than {each.steps}",
        )
        for each in summary.attacks
    ]


def broken_limits(summary: EvidenceSummary, max_replication: float | None, max_utility_loss: float | None) -> list[str]:
    """A sentence for each stated limit that is broken; what was not measured breaks its limit.

    Args:
        summary: of the evidence.
        max_replication: largest accepted share of the candidate's images of memorized captions that are copies.
        max_utility_loss: largest accepted change of the noise prediction on held-out captions.
    """
    found = []
    if max_replication is not None and summary.replication_rate > max_replication:
        found.append(
            f"Replication is {summary.replication_rate:.3f}, the limit is {max_replication:g}: that share of the "
            "candidate's images of memorized captions are copies."
        )
    if max_utility_loss is not None:
        if summary.utility_loss is None:
            found.append(f"The utility loss was not measured, so the limit {max_utility_loss:g} is not kept.")
        elif summary.utility_loss > max_utility_loss:
            found.append(
                f"The utility loss is {summary.utility_loss:.3f}, the limit is {max_utility_loss:g}: the relative "
                "change of the noise prediction on held-out captions."
            )
    return found


def _attack_sentences(summary: EvidenceSummary) -> Sequence[str]:
    found = {each.memorized: each for each in summary.attacks if each.model == CANDIDATE and each.start == "caption"}
    if True not in found:
        return ["Whether an attack on the text embedding brings anything back was not measured."]
    memorized, control = found[True], found.get(False)
    beside = (
        f", and {control.came_back.count} of {control.came_back.total} that it was never trained on" if control else ""
    )
    told = (
        f"An attack of {memorized.steps} steps on the text embedding brings {memorized.came_back.count} of "
        f"{memorized.came_back.total} memorized pictures back from the candidate{beside}"
    )
    forgotten = ": what no longer comes back by its caption has not been forgotten" if memorized.came_back.count else ""
    return [f"{told}{forgotten}."]


def _kind_rows(name: str, kind: KindReplication) -> list[Row]:
    title = f"{name} ({_of(kind.captions, kind.of, 'caption')}, {kind.images} images)"
    base, candidate = kind.base, kind.candidate
    rows = [(f"{title}: copies", *(f"{_percent(each.copies.share)} ({_interval(each.copies)})"
                                   for each in (base, candidate)))]  # fmt: skip
    if base.parts is not None:
        rows.append((f"{name}: images with a copied part", _percent(base.parts), _percent(candidate.parts)))
    for what, ours, theirs in (
        ("to the own training image", base.own, candidate.own),
        ("to the nearest of all training images", base.nearest, candidate.nearest),
        ("to the base's image of the same seed", base.to_base, candidate.to_base),
        ("between seeds", base.between_seeds, candidate.between_seeds),
    ):
        if ours is not None and theirs is not None:
            rows.append((f"{name}: similarity {what}", _spread(ours), _spread(theirs)))
    rows.append((f"{name}: upper bound of a caption's rate, median", "", _percent(kind.median_upper_bound)))
    return rows


def _interval(share: GroupedShare) -> str:
    return f"{share.low:.0%} to {share.high:.0%}"


def _spread(value: Spread) -> str:
    return f"{value.median:.2f} ± {value.deviation:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _of(number: int, total: int, what: str) -> str:
    return f"{number} of {total} {what}s" if total != 1 else f"the one {what}"
