"""What comes back: by its caption, by an attack, by other ways to ask, by one prompt's mask."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from diffusers import StableDiffusionPipeline

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.mask import Neuron
from nemo_prune.proof.attack import AttackRun, attack
from nemo_prune.proof.drawing import BASE, CANDIDATE
from nemo_prune.proof.evidence import RecallSummary
from nemo_prune.proof.membership import PictureLoss, area_under_curve, passes_per_picture, picture_loss
from nemo_prune.proof.recall_matrix import RecallMatrix, RecallRow, recall_row
from nemo_prune.proof.replication import CaptionReplication, measure_replication
from nemo_prune.proof.tokens import TokenActivations, token_activations
from nemo_prune.proof.training_images import TrainingImages
from nemo_prune.proof.variants import Variant, VariantImages, VariantResult, ways_to_ask
from nemo_prune.stages.verify_bench import TOO_LITTLE, Bench

_MOST_RECALLED = 12


def measure_captions(bench: Bench) -> list[CaptionReplication]:
    """Memorized captions by both models, on fresh seeds; this part is never left out."""
    if "replication" not in bench.parts:
        bench.parts.insert(0, "replication")
    with bench.part("replication") as (allowance, ledger, advance):
        settings = bench.settings
        return measure_replication(
            bench.gallery, bench.judge, bench.prompts, allowance, ledger, settings.bound, settings.most_rounds, advance
        )


def measure_attacks(bench: Bench) -> list[AttackRun]:
    """Attacks on the text embedding, as many as can be afforded, with their controls."""
    with bench.part("attack") as given:
        if given is None:
            return []
        allowance, ledger, advance = given
        cost = partial(bench.settings.attack.passes, bench.settings.drawing.guidance_scale)
        if allowance < cost():
            bench.left_out["attack"] = TOO_LITTLE
            return []
        runs = []
        # What an attack of a sort is likely to cost: as much as the last one. The base gives its pictures back at once.
        likely = {(BASE, True): cost(0)}
        for model, start, memorized, prompt, place in _attacks(bench.order, bench.settings.thorough):
            key = _attack_key(model, start, memorized, prompt)
            if ledger.spent + likely.get((model, memorized), cost()) > allowance and not ledger.knows(key):
                if model == CANDIDATE and memorized:
                    break
                continue
            work = _attack_run(bench, model, start, memorized, prompt, bench.settings.seed + 1000 * place)
            runs.append(ledger.once(key, AttackRun, work))
            likely[model, memorized] = cost(runs[-1].steps)
            advance(min(ledger.spent, allowance), allowance)
        return runs


def measure_membership(bench: Bench) -> dict[str, float]:
    """Membership inference: model -> area under the curve, memorized pictures against altered ones."""
    with bench.part("membership") as given:
        if given is None:
            return {}
        allowance, ledger, advance = given
        known = [prompt for prompt in bench.order if prompt.text in bench.training.images]
        known = known[: max(2, allowance // (2 * len(bench.pipes) * passes_per_picture()))]
        losses: dict[str, list[PictureLoss]] = {name: [] for name in bench.pipes}
        for done, prompt in enumerate(known, start=1):
            for name, pipe in bench.pipes.items():

                def work(pipe: StableDiffusionPipeline = pipe, prompt: Prompt = prompt) -> PictureLoss:
                    picture = bench.training.images[prompt.text]
                    control = bench.judge.never_trained_on(picture)
                    return PictureLoss(
                        *(picture_loss(pipe, prompt.text, each, bench.settings.seed) for each in (picture, control))
                    )

                losses[name].append(ledger.once(f"{name}: {prompt.text}", PictureLoss, work))
            advance(done, len(known))
        return {name: area_under_curve(each) for name, each in losses.items() if each}


def measure_variants(bench: Bench) -> list[VariantResult]:
    """Memorized captions asked for in other ways, the same captions in every way."""
    with bench.part("variants") as given:
        if given is None:
            return []
        allowance, ledger, advance = given
        ways = ways_to_ask(bench.quick, bench.ordinary, bench.judge.never_trained_on, bench.settings.seed)
        found: dict[str, list[VariantImages]] = {}
        cost = 2 * bench.quick.passes
        for prompt in bench.order:
            # All ways or none, so that every way has the same captions; image to image costs less than its share.
            if found and ledger.spent + cost * len(ways) > allowance and not ledger.knows(_way_key(ways[-1], prompt)):
                break
            for way in ways:

                def work(way: Variant = way, prompt: Prompt = prompt) -> VariantImages:
                    return _asked(bench, way, prompt)

                found.setdefault(way.name, []).append(ledger.once(_way_key(way, prompt), VariantImages, work))
                advance(min(ledger.spent, allowance), allowance)
        return [VariantResult.of(name, each) for name, each in found.items()]


def measure_tokens(bench: Bench) -> TokenActivations | None:
    """What drives the changed neurons; None where more than rows differ. It takes no pass."""
    if not bench.rows.are_a_mask:
        return None
    memorized = [prompt.text for prompt in bench.order[:64]]
    return token_activations(bench.base, bench.rows.mask, memorized, bench.ordinary[:64])


def measure_recall(bench: Bench, neurons: Mapping[str, Sequence[Neuron]]) -> RecallMatrix | None:
    """What single prompts' masks awaken; as many prompts as a square of images can be afforded of."""
    with bench.part("recall") as given:
        if given is None:
            return None
        allowance, ledger, advance = given
        known = [each.text for each in bench.order if each.text in bench.training.images and neurons.get(each.text)]
        number = min(_MOST_RECALLED, len(known), int((allowance / bench.quick.passes) ** 0.5))
        if number < 2:
            bench.left_out["recall"] = TOO_LITTLE
            return None
        captions = known[:number]

        def row(text: str | None) -> RecallRow:
            own = neurons[text] if text else ()
            return recall_row(bench.base, own, captions, bench.judge, bench.quick, bench.settings.seed)

        rows = {}
        before = ledger.once(f"nothing {number}", RecallRow, lambda: row(None))
        for text in captions:
            rows[text] = ledger.once(f"{number} {text}", RecallRow, lambda text=text: row(text))
            advance(len(rows), number)
        return RecallMatrix(tuple(captions), rows, before)


def recall_summary(recall: RecallMatrix | None, training: TrainingImages) -> RecallSummary | None:
    """The matrix in numbers."""
    if recall is None:
        return None
    own = {text: place for place, text in enumerate(training.images)}
    return RecallSummary(len(recall.rows), len(recall.rows) * len(recall.captions), recall.awakened(own))


def _attack_run(
    bench: Bench, model: str, start: str, memorized: bool, prompt: Prompt, seed: int
) -> Callable[[], AttackRun]:
    def work() -> AttackRun:
        target = bench.target(prompt)
        target = target if memorized else bench.judge.never_trained_on(target)
        found = attack(
            bench.pipes[model], target, prompt.text, start, bench.ordinary[0], bench.judge,
            bench.settings.drawing.guidance_scale, bench.settings.attack, bench.counter, seed,
        )  # fmt: skip
        return AttackRun(model, memorized, start, found.steps, max(found.curve), found.curve)

    return work


def _attacks(order: Sequence[Prompt], with_controls: bool = True) -> Iterator[tuple[str, str, bool, Prompt, int]]:
    """The attacks in the order of what they tell: model, start, whether the target is memorized, caption, its place.

    A control hardly ever comes back, so it takes all steps: there are fewer of them than of memorized pictures.
    """
    return (each for each in _all_attacks(order) if each[2] or with_controls)


def _all_attacks(order: Sequence[Prompt]) -> Iterator[tuple[str, str, bool, Prompt, int]]:
    for first in range(0, len(order), 4):
        block = list(enumerate(order))[first : first + 4]
        for place, prompt in block:
            yield CANDIDATE, "caption", True, prompt, place
            if place == first:
                yield CANDIDATE, "caption", False, prompt, place
            yield BASE, "caption", True, prompt, place
        for model, (place, prompt) in zip((BASE, CANDIDATE), block[::2], strict=False):
            yield model, "caption", False, prompt, place
        for place, prompt in block[::2]:
            for start in ("noise", "ordinary caption"):
                yield CANDIDATE, start, True, prompt, place
                if place == first:
                    yield CANDIDATE, start, False, prompt, place


def _attack_key(model: str, start: str, memorized: bool, prompt: Prompt) -> str:
    return f"{model}, {start}, {'memorized' if memorized else 'control'}: {prompt.text}"


def _asked(bench: Bench, way: Variant, prompt: Prompt) -> VariantImages:
    target = bench.target(prompt)
    copies = {}
    for name, pipe in bench.pipes.items():
        images = way.draw(pipe, prompt.text, target, [bench.settings.seed])
        if way.of_control:
            found = bench.judge.similarity_to(bench.judge.never_trained_on(target), images)
            copies[name] = sum(value >= bench.judge.cut for value in found)
        else:
            copies[name] = bench.copies(prompt, images)
    return VariantImages(copies[BASE], copies[CANDIDATE], len(images))


def _way_key(way: Variant, prompt: Prompt) -> str:
    return f"{way.name}: {prompt.text}"
