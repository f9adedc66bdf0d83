"""What was found and measured as rows of text: one wording for card, report and terminal."""

from collections.abc import Sequence

from nemo_prune.facts import (
    ALL_KINDS,
    NOT_ASKED,
    AttackFacts,
    CopyFacts,
    Counted,
    EvidenceFacts,
    SparedPoint,
    StatusCounts,
)
from nemo_prune.release.markdown import code, number, share
from nemo_prune.release.record import ImageFacts, MaskRecord, Record


def prompt_rows(counts: StatusCounts) -> list[tuple[str, int]]:
    """How many prompts have each status."""
    in_mask = "in the mask" if counts.unresolved_included else "not in the mask"
    return [
        ("examined", counts.total),
        ("localized", counts.localized),
        ("not memorized", counts.not_memorized),
        (f"unresolved ({in_mask})", counts.unresolved),
    ]


def spared_rows(spared: Sequence[SparedPoint]) -> list[tuple[int, str, str, int]]:
    """What a limit chose among: pruned neurons, how much prompts are held, change on ordinary prompts, prompts gone."""
    return [(point.neurons, f"{point.hold:g}", f"{point.change:.3f}", point.gone) for point in spared]


def layer_rows(mask: MaskRecord) -> list[tuple[str, int, int]]:
    """Pruned neurons and all neurons of each layer, and of all layers."""
    rows = [(code(name), count, mask.sizes[name]) for name, count in mask.counts.items()]
    return [*rows, ("all", mask.num_neurons, sum(mask.sizes.values()))]


def before_after_rows(record: Record) -> list[tuple[str, str, str]]:
    """What a run measured before and after pruning: name, before, after."""
    scores, gone, cost = record.measured.scores, record.measured.gone, record.measured.cost
    controls = f"as many random neurons: {share(cost.random)}; everything suppressed: {share(cost.everything)}"
    return [
        (f"memorized prompts ({gone.memorized}) that are gone", "0", str(gone.gone)),
        ("those that are at least silent: no seed's noise prediction is like the unpruned one", "0", str(gone.silent)),
        (f"ordinary prompts ({gone.ordinary}) that come to resemble a memorized one", "0", str(gone.called_up)),
        (
            f"memorized prompts ({record.prompts.memorized}) above the threshold on fresh seeds",
            str(scores.above_threshold_before),
            str(scores.above_threshold_after),
        ),
        ("their memorization score on fresh seeds, median", number(scores.median_before), number(scores.median_after)),
        (
            "their noise prediction against the unpruned one, highest similarity, median",
            "1.000",
            number(scores.median_suppressed_similarity),
        ),
        *_image_rows(record.measured.images),
        (f"change of the noise prediction on ordinary prompts ({controls})", "0.0%", share(cost.mask)),
    ]


def _image_rows(images: ImageFacts) -> list[tuple[str, str, str]]:
    memorized, ordinary, rows = images.memorized, images.ordinary, []
    copying = f"images of {memorized.num_prompts} memorized prompts that copy any training image"
    if memorized.copies_before is not None:
        cut = f" (SSIM and correlation at least {images.cut:.2f})"
        rows.append((copying + cut, share(memorized.copies_before), share(memorized.copies_after)))
    elif memorized.num_prompts:
        rows.append((f"{copying} (none is known)", "not compared", "not compared"))
    if memorized.num_prompts:
        between = number(memorized.between_seeds_before), number(memorized.between_seeds_after)
        rows.append(("similarity of a memorized prompt's images between seeds (SSIM), mean", *between))
        rows.append(("their similarity to the unpruned model's images, mean", "1.000", number(memorized.to_unpruned)))
    if ordinary.num_prompts:
        name = f"similarity of {ordinary.num_prompts} ordinary prompts' images to the unpruned model's, mean"
        between = f"(between seeds: {ordinary.between_seeds_before:.3f})"
        rows.append((f"{name} {between}", "1.000", number(ordinary.to_unpruned)))
    return rows


def evidence_rows(evidence: EvidenceFacts) -> list[tuple[str, str, str]]:
    """The key figures of the evidence: name, base, candidate."""
    everything = evidence.replication[ALL_KINDS]
    base, candidate = everything.base, everything.candidate
    rows = [
        (f"images of {everything.captions} memorized captions that are copies", share(base.share), _copies(candidate))
    ]
    if candidate.parts is not None:
        rows.append(("images with a copied part", share(base.parts), share(candidate.parts)))
    by_model = {(each.model, each.memorized): each for each in evidence.attacks if each.start == "caption"}
    for memorized, what in ((True, "memorized pictures"), (False, "pictures never trained on")):
        found = [by_model.get((model, memorized)) for model in ("base", "candidate")]
        if any(found):
            steps = next(each.steps for each in found if each)
            rows.append((f"{what} that an attack of {steps} steps brings back", *map(_came_back, found)))
    if evidence.membership:
        values = (f"{evidence.membership[model]:.2f}" for model in ("base", "candidate"))
        rows.append(("membership inference on memorized pictures, AUC", *values))
    if evidence.utility is not None:
        held_out = evidence.utility.held_out
        others = "; ".join(f"{name}: {share(value)}" for name, value in held_out.items() if name != "candidate")
        name = f"change of the noise prediction on held-out captions ({others})"
        rows.append((name, "0.0%", share(held_out["candidate"])))
    return rows


def evidence_notes(evidence: EvidenceFacts) -> list[str]:
    """How the evidence was gathered, and what is missing in it, as sentences."""
    drawing, everything = evidence.drawing, evidence.replication[ALL_KINDS]
    notes = [
        f"An image counts as a copy from a similarity of {evidence.cut:g} on, by {evidence.yardstick}. Images: "
        f"{drawing['scheduler'].upper()}, {drawing['num_inference_steps']} steps, guidance "
        f"{drawing['guidance_scale']:g}, {everything.images} per model. In brackets: intervals at 95%, over groups of "
        "near-duplicate captions."
    ]
    if others := everything.captions - everything.by_training_image:
        notes.append(
            f"For {others} of {everything.captions} captions no training image is known, so the base's own images of "
            "other seeds stand in."
        )
    if missing := everything.of - everything.captions:
        notes.append(f"{missing} memorized captions were not drawn.")
    if evidence.attacks and all(each.memorized for each in evidence.attacks):
        notes.append("Whether an attack brings back pictures that were never trained on, too, was not measured.")
    return notes + [f"Left out: {part}: {reason}." for part, reason in evidence.left_out.items() if reason != NOT_ASKED]


def counted(value: Counted) -> str:
    """A count out of a total with its exact interval."""
    if not value.total:
        return "not measured"
    return f"{value.count} of {value.total} ({value.low:.0%} to {value.high:.0%})"


def _copies(facts: CopyFacts) -> str:
    return f"{share(facts.share)} ({facts.low:.0%} to {facts.high:.0%})"


def _came_back(attacks: AttackFacts | None) -> str:
    return "not measured" if attacks is None else counted(attacks.came_back)
