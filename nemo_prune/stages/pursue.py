"""What is gone under a mask; a mask that is pursued until nothing copies; and what a limit spares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from PIL import Image

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.engine.budget import CurvePoint, utility_curve, within
from nemo_prune.engine.completing import Copy, Looks
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.gone import Verdict, judge, judge_ordinary
from nemo_prune.engine.localize import Localizer, PromptLocalization, detect, not_memorized
from nemo_prune.engine.pursuit import Pursuit, PursuitSettings, pursue
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.json_values import to_json
from nemo_prune.files.work import LineLog, WorkFolder
from nemo_prune.mask import NeuronMask
from nemo_prune.progress import Listener, Stage
from nemo_prune.proof.drawing import Drawing, captions_at_once, draw_captions
from nemo_prune.proof.images import Likeness, as_compared
from nemo_prune.proof.sampling import stratified
from nemo_prune.settings import Plan, VerificationSettings
from nemo_prune.stages.bar import Bar, afforded

# Seeds of images that the final proof does not draw.
_LOOP_SEED_STEP = 1000
# Images of each caption, and of one that copied, when a mask is completed for it.
LOOK_SEEDS, _CLOSE_SEEDS = 2, 4
# Steps that say what an image will be; of fewer all images of a model are much the same.
_FEW_STEPS = 8
# How far under the cut memorized captions' images must stay: other seeds come out higher.
_ROOM = 0.05
# Passes of a search by learned gates, counted on 25 captions (docs/masks.md); it grows with the captions that the
# learning leaves to do.
LEARNING_PASSES = 15_600


@dataclass(frozen=True)
class Judged:
    """Captions under a mask.

    Attributes:
        memorized: a verdict per memorized caption.
        ordinary: a verdict per ordinary caption that was watched.
    """

    memorized: tuple[Verdict, ...]
    ordinary: tuple[Verdict, ...]


def detect_corpus(localizer: Localizer, texts: Sequence[str]) -> list[PromptLocalization]:
    """Which prompts are memorized, without a search: those are ``unresolved`` until a mask makes them go.

    Args:
        localizer: the model and what is usual for it.
        texts: the prompts.
    """
    found, at_once = [], localizer.scorer.prompts_at_once
    for start in range(0, len(texts), at_once):
        for each in detect(localizer.scorer, texts[start : start + at_once], localizer.threshold):
            memorized = replace(not_memorized(each), status="unresolved", kept_seeds=each.kept_seeds)
            found.append(memorized if each.kept_seeds else not_memorized(each))
    return found


def pursue_mask(
    bar: Bar,
    localizations: Sequence[PromptLocalization],
    first: NeuronMask | None,
    looks: Looks,
    plan: Plan,
    work: WorkFolder,
    listener: Listener,
) -> tuple[NeuronMask, Sequence[PromptLocalization]]:
    """A mask under which nothing copies: searched again for what comes back in images, or said what remains.

    Args:
        bar: the model, and what masks are judged against.
        localizations: one per prompt.
        first: the mask of the paper's search, which is kept if nothing copies under it; None where there is none.
        looks: draws images under a mask and says what copies.
        plan: names the search.
        work: where rounds and the learning are kept.
        listener: hears the stages.

    Returns:
        The mask, and the prompts as they are under it.
    """
    predictor = bar.released
    if not bar.memorized:
        return first or NeuronMask.from_neurons((), predictor.sizes), localizations
    search = "learned" if plan.search == "greedy" else plan.search
    settings = PursuitSettings(search=search, limits=afforded(plan.max_utility_loss))
    with listener.stage(Stage.PURSUE) as advance:
        pursuit = pursue(
            predictor, bar.memorized, bar.ordinary, bar.localizer.threshold, settings, looks, advance, first, work,
            lambda: bar.states,
        )  # fmt: skip
    if first is not None and not pursuit.rounds:
        return first, localizations
    best = pursuit.best
    if best.real_copies:
        listener.say(_what_remains(pursuit))
    came_back = {each.prompt for each in best.real_copies} | {v.prompt for v in best.not_gone if not v.is_silent}
    found = [
        replace(each, status="unresolved" if each.prompt in came_back else "localized") if each.is_memorized else each
        for each in localizations
    ]
    return best.mask, found


def _what_remains(pursuit: Pursuit) -> str:
    left, price = len({each.prompt for each in pursuit.best.real_copies}), pursuit.next_step_costs
    more = "" if price is None else f" A stricter mask changed ordinary captions by {price:+.0%} of everything more."
    return f"Images of {left} prompts still copy after {len(pursuit.rounds)} rounds of the search.{more}"


def spare_ordinary(
    bar: Bar, mask: NeuronMask, max_utility_loss: float | None, listener: Listener
) -> tuple[NeuronMask, Sequence[CurvePoint]]:
    """The mask that a limit on the change for ordinary captions allows, and the curve that it is chosen from.

    Args:
        bar: what masks are judged against; memorized captions are held less from then on, where that is needed.
        mask: the whole one.
        max_utility_loss: the limit; None keeps the mask, and no curve is made.
        listener: hears the stage.
    """
    if max_utility_loss is None or not mask.num_neurons or not bar.memorized:
        return mask, ()
    released = bar.released
    with listener.stage(Stage.SPARE) as advance:
        curve = utility_curve(
            released, bar.corpus, bar.states, mask.neurons, advance=advance, log=bar.log, limit=max_utility_loss
        )
    taken = within(curve, max_utility_loss)
    if taken is not curve[0]:
        listener.say(_what_is_given_up(curve, taken))
    if taken.hold != 1:
        released.compensation = released.compensation.held_by(taken.hold)
    return NeuronMask.from_neurons(taken.neurons, released.sizes), curve


def _what_is_given_up(curve: Sequence[CurvePoint], taken: CurvePoint) -> str:
    whole, smallest = curve[0], min(curve[:-1], key=lambda point: point.change)
    if not taken.neurons:
        return (
            f"Nothing is pruned: ordinary prompts would change by {smallest.change:.2f} of what everything suppressed "
            f"changes at least, and {len(smallest.gone)} prompts be gone. --max-utility-loss names a higher limit."
        )
    less = "" if taken.hold == 1 else f", and memorized prompts are held {1 / taken.hold:.0f} times less"
    return (
        f"To keep the limit {len(taken.neurons)} of {len(whole.neurons)} neurons are pruned{less}. Ordinary prompts "
        f"change by {taken.change:.2f} of what everything suppressed changes instead of {whole.change:.2f}, and "
        f"{len(taken.gone)} prompts are gone instead of {len(whole.gone)}."
    )


def judge_mask(bar: Bar, scaled: NoisePredictor, mask: NeuronMask, listener: Listener) -> Judged:
    """Judge every memorized caption under the final mask, on the seeds of the detection and on fresh ones.

    Args:
        bar: what it is judged against.
        scaled: the unpruned model; what it suppresses it multiplies as the pruning does.
        mask: the final one.
        listener: hears the stage.
    """
    with listener.stage(Stage.JUDGE):
        if not mask.num_neurons or not bar.memorized or not bar.ordinary:
            return Judged((), ())
        memorized = judge(scaled, bar.corpus, mask.neurons, bar.log)
        return Judged(tuple(memorized), tuple(judge_ordinary(scaled, bar.corpus, mask.neurons, bar.log)))


def look_drawing(verification: VerificationSettings) -> Drawing:
    """How an image is drawn that is looked at for copies while a mask is searched.

    A third of the steps of the images that are shown is enough, if these are not few: whether an image copies is
    decided early.
    """
    shown = Drawing.of(verification)
    few = min(_FEW_STEPS, shown.num_inference_steps)
    return replace(shown, num_inference_steps=max(few, shown.num_inference_steps // 3))


class CopyLooks:
    """Draws images under a mask and says what copies: a training image, or the base's own where none is known.

    By either yardstick: that of the evidence, and that of the images before and after.

    Two images of each caption are enough to see that a mask leaves copies; captions that copied get some more. How many
    copies a mask leaves is measured at the end, on other latents. What was seen is kept in a log.

    Args:
        predictor: the model; images are drawn with what it changes behind a mask.
        memorized: captions that the model memorizes.
        ordinary: captions that it does not; some are looked at.
        training_images: caption -> its training image, where one is known.
        verification: how images are drawn, and how many captions are looked at.
        log_file: where is kept what was seen.
    """

    def __init__(
        self,
        predictor: NoisePredictor,
        memorized: Sequence[Prompt],
        ordinary: Sequence[str],
        training_images: Mapping[str, Image.Image],
        verification: VerificationSettings,
        log_file: Path,
    ) -> None:
        self._predictor, self._pipe = predictor, predictor.pipe
        self._drawing, self._cut = look_drawing(verification), verification.replication_cut
        first = verification.seed + _LOOP_SEED_STEP
        self._seeds, self._close_seeds = range(first, first + LOOK_SEEDS), range(first, first + _CLOSE_SEEDS)
        self._spread = [memorized[place].text for place in stratified(memorized)][: verification.max_prompts]
        self._shown = [*self._spread, *ordinary[: verification.ordinary_images]]
        texts = [each.text for each in memorized]
        self._memorized = frozenset(texts)
        self._known = {text: as_compared(training_images[text]) for text in texts if text in training_images}
        depends_on = {
            "shown": text_hash(self._shown),
            "training images": sha256(b"".join(each.tobytes() for each in self._known.values())).hexdigest(),
            "drawing": to_json(self._drawing),
            "cut": self._cut,
            "room": _ROOM,
            "yardsticks": "either, at equal contrast",
            "seeds": [list(self._seeds), list(self._close_seeds)],
        }
        self._log = LineLog(log_file, depends_on)
        self._seen = {
            (record["mask"], tuple(record["prompts"])): [Copy(**copy) for copy in record["copies"]]
            for record in self._log
        }

    def __call__(self, mask: NeuronMask, prompts: Sequence[str] | None = None) -> list[Copy]:
        applied = self._predictor.in_weights(mask)
        look = applied.digest, tuple(prompts or ())
        if look not in self._seen:
            self._seen[look] = self._copies(applied, prompts)
            self._log.append({"mask": look[0], "prompts": look[1], "copies": to_json(self._seen[look])})
        return self._seen[look]

    @cached_property
    def _references(self) -> tuple[list[str], Likeness]:
        """Captions, and the likeness to their training images or else the unpruned model's."""
        first = self._seeds[:1]
        pictures = self._known or {text: images[0] for text, images in self._draw(self._spread, first).items()}
        return list(pictures), Likeness(list(pictures.values()))

    def _copies(self, applied: NeuronMask, prompts: Sequence[str] | None) -> list[Copy]:
        (sources, likeness), found = self._references, []
        shown, seeds = (self._shown, self._seeds) if prompts is None else (prompts, self._close_seeds)
        with apply_mask(self._pipe, applied):
            images = self._draw(shown, seeds)
        for text, drawn in images.items():
            values, nearest = likeness.nearest(drawn)
            share, highest = float((values >= self._cut_of(text)).float().mean()), int(values.argmax())
            if share:
                found.append(Copy(text, sources[int(nearest[highest])], share, float(values[highest]) < self._cut))
        return found

    def _cut_of(self, text: str) -> float:
        """From which likeness on an image of a caption counts as a copy."""
        return self._cut - (_ROOM if text in self._memorized else 0.0)

    def _draw(self, texts: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Image.Image]]:
        """Images of each caption, as they are compared."""
        drawn = {}
        for group in captions_at_once(texts, len(seeds)):
            for text, images in zip(group, draw_captions(self._pipe, group, self._drawing, seeds), strict=True):
                drawn[text] = [as_compared(image) for image in images]
        return drawn
