"""What the pruning does: prompts scored again, its cost for ordinary prompts, images before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image

from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import Localizer, PromptLocalization
from nemo_prune.engine.scorer import Scorer
from nemo_prune.facts import Cost
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.images import ImageFolder
from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.files.work import LineLog, Replay
from nemo_prune.mask import Pruning
from nemo_prune.progress import Listener, Stage
from nemo_prune.proof.cost import full_mask, matched_random_mask, noise_change
from nemo_prune.proof.drawing import Drawing, captions_at_once, draw_captions
from nemo_prune.proof.images import ImageEvidence, as_compared, compare_images
from nemo_prune.proof.scores import ScoresUnderMask, score_under_mask
from nemo_prune.settings import VerificationSettings
from nemo_prune.stages.examined import ExaminedPrompt

# Prompts that are scored again together, in batches of their seeds.
_BATCHES_AT_ONCE = 8

Images = Mapping[str, Sequence[Image.Image]]


def score_again(
    localizer: Localizer,
    scorer: Scorer,
    localizations: Sequence[PromptLocalization],
    pruning: Pruning,
    verification: VerificationSettings,
    log_file: Path,
    listener: Listener,
) -> list[ScoresUnderMask]:
    """Score every prompt under the final mask.

    Args:
        localizer: has the memorized prompts as they were detected, and the threshold.
        scorer: the unpruned model; what it suppresses it multiplies as the pruning does.
        localizations: one per prompt.
        pruning: the final mask and its scale.
        verification: names the fresh latents.
        log_file: where the scores are kept as they come.
        listener: hears the stage.
    """
    depends_on = {
        "mask": pruning.mask.digest,
        "scale": pruning.scale,
        "threshold": localizer.threshold,
        "seed": verification.score_seed,
    }
    log = LineLog(log_file, depends_on)
    known = {record.pop("prompt"): from_json(ScoresUnderMask, record) for record in log}
    fresh_latents = scorer.predictor.initial_latents(seed=verification.score_seed)
    waiting = [each for each in localizations if each.prompt not in known]
    at_once = _BATCHES_AT_ONCE * scorer.prompts_at_once
    with listener.stage(Stage.SCORE_AGAIN) as advance:
        for start in range(0, len(waiting), at_once):
            group = waiting[start : start + at_once]
            scores = score_under_mask(localizer, scorer, group, pruning.mask, fresh_latents)
            for localization, found in zip(group, scores, strict=True):
                log.append({"prompt": localization.prompt, **to_json(found)})
                known[localization.prompt] = found
            advance(len(known), len(localizations))
    return [known[localization.prompt] for localization in localizations]


def measure_cost(
    predictor: NoisePredictor,
    scaled: NoisePredictor,
    texts: Sequence[str],
    pruning: Pruning,
    calibration: Calibration,
    log_file: Path,
) -> Cost:
    """Change on ordinary prompts under the mask, beside as many random neurons and everything suppressed.

    Args:
        predictor: the unpruned model; what it suppresses is 0.
        scaled: the same; what it suppresses it multiplies as the pruning does.
        texts: ordinary prompts.
        pruning: the final mask and its scale.
        calibration: has the usual activation of every neuron.
        log_file: where the cost is kept.
    """
    log = LineLog(log_file, {"mask": pruning.mask.digest, "scale": pruning.scale, "prompts": text_hash(texts)})

    def measured() -> dict:
        random = matched_random_mask(pruning.mask, calibration.statistics.mean, predictor.settings.seed)
        everything = noise_change(predictor, texts, {"everything": full_mask(predictor.sizes)})
        return to_json(Cost(**noise_change(scaled, texts, {"mask": pruning.mask, "random": random}), **everything))

    return from_json(Cost, Replay(log)(measured))


class ImageProof:
    """The images that are compared before and after pruning, each drawn once.

    Args:
        folder: where they are kept.
        texts: captions to draw, memorized ones first.
        pruning: what happens in between.
        verification: how they are drawn.
        training_images: caption -> its training image, where one is known.
    """

    def __init__(
        self,
        folder: Path,
        texts: Sequence[str],
        pruning: Pruning,
        verification: VerificationSettings,
        training_images: Mapping[str, Image.Image],
    ) -> None:
        self.texts, self.training_images = list(texts), training_images
        self.before: Images = {}
        self.after: Images = {}
        self._compared = [as_compared(each) for each in training_images.values()]
        self._cut, self._drawing = verification.replication_cut, Drawing.of(verification)
        self._seeds = range(verification.seed, verification.seed + verification.images_per_prompt)
        self._folder = ImageFolder(
            folder,
            {
                "shown": text_hash(texts),
                "mask": pruning.mask.digest,
                "scale": pruning.scale,
                "drawing": to_json(self._drawing),
                "seeds": list(self._seeds),
            },
        )

    def draw_before(self, pipe: StableDiffusionPipeline, listener: Listener) -> None:
        """Draw with the unpruned model."""
        self.before = self._draw(pipe, "before", listener, Stage.IMAGES_BEFORE)

    def draw_after(self, pipe: StableDiffusionPipeline, listener: Listener) -> None:
        """Draw the same with the pruned model."""
        self.after = self._draw(pipe, "after", listener, Stage.IMAGES_AFTER)

    def added_to(self, examined: Sequence[ExaminedPrompt]) -> list[ExaminedPrompt]:
        """The prompts, with what was seen of those that were drawn."""
        return [
            replace(each, images=self.evidence(each.text)) if each.text in self.after else each for each in examined
        ]

    def evidence(self, text: str) -> ImageEvidence:
        """What one caption's images show."""
        return compare_images(self.before[text], self.after[text], self._compared, self._cut)

    def _draw(self, pipe: StableDiffusionPipeline, when: str, listener: Listener, stage: Stage) -> Images:
        drawn = {}
        with listener.stage(stage) as advance:
            for texts in captions_at_once(self.texts, len(self._seeds)):
                names = [f"{len(drawn) + place:03d}_{when}" for place in range(len(texts))]
                make = partial(draw_captions, pipe, texts, self._drawing, self._seeds)
                images = self._folder.kept_or_drawn_together(names, len(self._seeds), make)
                drawn |= dict(zip(texts, images, strict=True))
                advance(len(drawn), len(self.texts))
        return drawn
