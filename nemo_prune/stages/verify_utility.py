"""What the candidate still can do, within a part of the budget."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from nemo_prune.proof.drawing import BASE, CANDIDATE
from nemo_prune.proof.evidence import OrdinaryControl
from nemo_prune.proof.image_networks import Alignment, distances, image_features
from nemo_prune.proof.intervals import Equivalence, Rate, Spread
from nemo_prune.proof.utility import (
    RANDOM,
    CaptionChange,
    CaptionImages,
    NoiseChange,
    NoiseJudge,
    Utility,
    caption_images,
    denoising_equivalence,
    split_ordinary,
)
from nemo_prune.stages.verify_bench import Bench


def measure_utility(bench: Bench) -> tuple[Utility | None, OrdinaryControl | None]:
    """Utility beside its baselines, and what the base's images of ordinary captions seem to copy."""
    with bench.part("utility") as given:
        if given is None:
            return None, None
        allowance, ledger, advance = given
        memorized = [prompt.text for prompt in bench.prompts]
        held_out, near = split_ordinary(bench.ordinary, memorized, bench.settings.utility_captions)
        noise = NoiseJudge(bench.base, bench.candidate, bench.rows, bench.ordinary, bench.settings.seed)
        others = [unet for unet in noise.unets if unet not in (bench.base.unet, bench.candidate.unet)]
        random = noise.random if bench.settings.thorough else None
        models = (BASE, CANDIDATE) if random is None else (BASE, CANDIDATE, RANDOM)
        number = max(2, min(len(held_out), allowance // (4 * noise.passes)))
        if not bench.settings.thorough:
            near, number = [], len(held_out)
        held_out, near = held_out[:number], near[:number]
        rest = allowance - (len(held_out) + len(near)) * noise.passes
        drawn = _affordable(held_out, rest, lambda text: sum(bench.gallery.costs(model, text) for model in models))
        total = len(held_out) + len(near) + len(drawn)
        changes: dict[str, CaptionChange] = {}
        with bench.counter.counting(*others):
            for text in held_out + near:
                changes[text] = ledger.once(f"noise: {text}", CaptionChange, lambda text=text: noise.change(text))
                advance(len(changes), total)
        images = []
        bench.gallery.lend(RANDOM, bench.base)
        bench.gallery.expect(drawn)
        for text in drawn:

            def work(text: str = text) -> CaptionImages:
                return caption_images(bench.gallery, bench.base, random, bench.judge, text)

            images.append(ledger.once(f"images: {text}", CaptionImages, work))
            advance(len(changes) + len(images), total)
        return _utility_of(bench, held_out, near, drawn, changes, images, noise), _control(bench, images)


def _affordable(texts: Sequence[str], passes: int, cost: Callable[[str], int]) -> list[str]:
    """The first captions, as many as the passes suffice for, at least one."""
    costs = list(accumulate(map(cost, texts)))
    return list(texts[: max(1, sum(each <= passes for each in costs))])


def _utility_of(
    bench: Bench,
    held_out: Sequence[str],
    near: Sequence[str],
    drawn: Sequence[str],
    changes: Mapping[str, CaptionChange],
    images: Sequence[CaptionImages],
    noise: NoiseJudge,
) -> Utility:
    held = NoiseChange.of([changes[text] for text in held_out], noise.timesteps)
    alignment, aligned = _alignment(bench, drawn)
    return Utility(
        held_out=held,
        neighbours=NoiseChange.of([changes[text] for text in near], noise.timesteps),
        loss=held.loss(),
        equivalence=denoising_equivalence([changes[text] for text in held_out], bench.settings.margin),
        images_to_base=Spread.of([value for each in images for value in each.to_base]),
        images_random=Spread.of([value for each in images for value in each.random_to_base]),
        images_between_seeds=Spread.of([value for each in images for value in each.between_seeds]),
        alignment=alignment,
        alignment_equivalence=aligned,
        distances=_distances(bench, drawn),
    )


def _alignment(bench: Bench, texts: Sequence[str]) -> tuple[dict[str, Spread] | None, Equivalence | None]:
    if bench.settings.clip is None:
        return None, None
    clip = Alignment(bench.settings.clip, bench.base.unet.device.type)
    found = {name: [clip(text, bench.gallery.images(name, text)) for text in texts] for name in bench.pipes}
    differences = [
        sum(theirs) / len(theirs) - sum(ours) / len(ours)
        for ours, theirs in zip(found[BASE], found[CANDIDATE], strict=True)
    ]
    spreads = {name: Spread.of([value for each in values for value in each]) for name, values in found.items()}
    margin = bench.settings.margin * abs(spreads[BASE].median)
    return spreads, Equivalence.of("cosine of caption and image (CLIP)", differences, margin)


def _distances(bench: Bench, texts: Sequence[str]) -> Mapping[str, float] | None:
    if bench.settings.features is None:
        return None
    described = [
        image_features(bench.settings.features, [each for text in texts for each in bench.gallery.images(name, text)])
        for name in bench.pipes
    ]
    return distances(*described)


def _control(bench: Bench, images: Sequence[CaptionImages]) -> OrdinaryControl | None:
    if not bench.training.images:
        return None
    near = [value >= bench.judge.cut for each in images for value in each.nearest_of_base]
    parts = [value for each in images for value in each.parts_of_base]
    return OrdinaryControl(Rate.of(sum(near), len(near)), max([bench.judge.cut, *parts]))
