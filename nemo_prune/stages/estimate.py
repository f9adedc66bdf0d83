"""How long a run will take: the passes of every stage, and what one takes here."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_prune.engine.attended import POINTS
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.pursuit import PursuitSettings
from nemo_prune.progress import Stage
from nemo_prune.proof.drawing import Drawing
from nemo_prune.settings import Plan
from nemo_prune.stages.bar import FRESH_SEEDS, WATCHED
from nemo_prune.stages.compensate import USUAL_PROMPTS
from nemo_prune.stages.localize import WEIGHING_PROMPTS, weighs_neurons
from nemo_prune.stages.pursue import LEARNING_PASSES, LOOK_SEEDS, look_drawing

# Passes for a memorized prompt beyond its detection, by the neurons that are searched: counted on the demo model, and
# on a model of SD v1-4's memorized prompts (benchmarks/full_run.py). In between they are taken to follow a power.
_NEURONS = (704, 5760)
_LOCALIZATION = {"thinned": (25.0, 157.0), "minimal": (25.0, 157.0), "union": (27.0, 163.0)}
_MERGING = {"thinned": (11.0, 89.0), "minimal": (15.0, 40.0), "union": (0.0, 0.0)}
# What thinning asks on ordinary captions where nothing is to be thinned out; up to 2,500 where much is.
_THINNING_PASSES = 600
_WEIGHING_PASSES = 20
_COST_PASSES = 10
_LONG_BATCH_S = 10
_MINUTE, _HOUR = 60, 3600


@dataclass(frozen=True)
class TimeEstimate:
    """How long a run will take.

    Attributes:
        a_pass: seconds that one latent takes through the U-Net once, in a full batch.
        passes: stage -> sample passes at least, if no prompt is memorized, and at most, if all are.
    """

    a_pass: float
    passes: Mapping[Stage, tuple[float, float]]

    @property
    def seconds(self) -> tuple[float, float]:
        """Of all stages, at least and at most."""
        fewest, most = (sum(each[end] for each in self.passes.values()) for end in (0, 1))
        return fewest * self.a_pass, most * self.a_pass

    @property
    def is_long(self) -> bool:
        """Whether a user should be told before waiting for it."""
        return sum(self.seconds) / 2 > _HOUR / 2

    def described(self, num_prompts: int) -> str:
        """The estimate in words."""
        fewest, most = map(duration, self.seconds)
        images = self.passes[Stage.IMAGES_BEFORE][1] + self.passes[Stage.IMAGES_AFTER][1]
        return (
            f"A pass of the U-Net takes {self.a_pass:.2g} s here, so that a run on {num_prompts} prompts will take "
            f"{fewest} (none is memorized) to {most} (all are), of which the images take "
            f"{duration(images * self.a_pass)}. The run goes on, and can be stopped and taken up again; --limit N "
            "examines the first N prompts."
        )


def estimate_run(predictor: NoisePredictor, num_prompts: int, num_ordinary: int, plan: Plan) -> TimeEstimate:
    """Measure the first passes and reckon how long a run will take.

    Args:
        predictor: the model.
        num_prompts: prompts to examine.
        num_ordinary: ordinary prompts that are yet to be calibrated on.
        plan: what is to be done.
    """
    latents = predictor.initial_latents(num_samples=predictor.batch_size)
    prompt_embeds = predictor.encode([""]).expand(len(latents), -1, -1)

    def seconds_of_a_batch() -> float:
        began = time.perf_counter()
        predictor.predict_each(latents, prompt_embeds, [()] * len(latents)).cpu()
        return time.perf_counter() - began

    seconds = seconds_of_a_batch()
    # The first batch also pays for memory and compiled kernels, which matters only where it is short.
    if seconds < _LONG_BATCH_S:
        seconds = seconds_of_a_batch()
    num_neurons = sum(predictor.sizes.values())
    return TimeEstimate(seconds / len(latents), passes_of_stages(num_neurons, num_prompts, num_ordinary, plan))


def passes_of_stages(
    num_neurons: int, num_prompts: int, num_ordinary: int, plan: Plan
) -> dict[Stage, tuple[float, float]]:
    """Sample passes of every stage, at least and at most; without further rounds where captions are left or copy.

    Args:
        num_neurons: that are searched.
        num_prompts: prompts to examine.
        num_ordinary: ordinary prompts that are yet to be calibrated on.
        plan: what is to be done.
    """
    seeds, verification = plan.settings.num_samples, plan.verification
    detection, calibration = num_prompts * seeds, num_ordinary * seeds
    weighing = WEIGHING_PROMPTS * _WEIGHING_PASSES if weighs_neurons(plan) else 0
    weighing += USUAL_PROMPTS * POINTS if plan.ablation != "zero" else 0
    compensating = num_prompts * POINTS if plan.ablation == "compensated" else 0
    searching, merging = (num_prompts * _between(num_neurons, each[plan.merge]) for each in (_LOCALIZATION, _MERGING))
    merging += _THINNING_PASSES if plan.search == "greedy" and plan.merge == "thinned" else 0
    cost = verification.cost_prompts * _COST_PASSES
    an_image, a_look = Drawing.of(verification).passes, look_drawing(verification).passes
    shown = min(num_prompts, verification.max_prompts)
    ordinary = verification.ordinary_images * verification.images_per_prompt * an_image
    memorized = shown * verification.images_per_prompt * an_image
    # Images of each caption under the mask, and what they are compared with where no training image is known.
    looks = 0 if plan.merge == "union" else (LOOK_SEEDS * (shown + verification.ordinary_images) + shown) * a_look
    learning = 0 if plan.search == "greedy" else LEARNING_PASSES
    # With nothing, everything and the mask suppressed; what the detection predicted is known.
    judging = 3 * (seeds + FRESH_SEEDS) * (num_prompts + WATCHED) - detection
    # What is looked at and judged to see what is to be held harder is known from then on, but for ordinary prompts.
    holding = 0
    if plan.ablation == "compensated" and plan.search == "greedy" and plan.merge != "union":
        walk = PursuitSettings().walked * PursuitSettings().points
        known = judging - (seeds + FRESH_SEEDS) * WATCHED
        holding, looks, judging = known + looks + walk, 0, judging - known
    return {
        Stage.CALIBRATE: (calibration, calibration),
        Stage.WEIGH: (weighing, weighing),
        Stage.LOCALIZE: (detection, detection + searching),
        Stage.MERGE: (0, merging),
        Stage.COMPENSATE: (0, compensating),
        Stage.HOLD: (0, holding),
        Stage.PURSUE: (0, learning + looks),
        Stage.JUDGE: (0, judging),
        # Fresh latents with the mask and without, and of memorized prompts the kept seeds.
        Stage.SCORE_AGAIN: (2 * detection + cost, 3 * detection + cost),
        Stage.IMAGES_BEFORE: (ordinary, ordinary + memorized),
        Stage.IMAGES_AFTER: (ordinary, ordinary + memorized),
        Stage.ATTACK: (0, verification.evidence_budget),
    }


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days in words."""
    for unit, name in ((24 * _HOUR, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"


def _between(num_neurons: int, passes: tuple[float, float]) -> float:
    """Passes a prompt for a number of neurons, on the power law through the two that were counted."""
    small, large = passes
    if not small:
        return 0.0
    power = math.log(large / small) / math.log(_NEURONS[1] / _NEURONS[0])
    return small * (num_neurons / _NEURONS[0]) ** power
