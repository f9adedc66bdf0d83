"""What was found and measured as rows of text: one wording for card, report and terminal."""

from nemo_prune.facts import StatusCounts
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
