"""How long a run will take, from its first passes."""

import time
from dataclasses import dataclass

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.settings import VerificationSettings

# What finding the neurons of a memorized prompt takes beyond its detection where 675 candidates are tried and
# 21 needed, the paper's median of template prompts of SD v1-4 (benchmarks/full_size.py counts it).
_MOST_TRIALS = 181
_LONG_BATCH_S = 10
_MINUTE, _HOUR = 60, 3600


@dataclass(frozen=True)
class TimeEstimate:
    """How long a run will take, in seconds.

    Attributes:
        a_pass: one latent through the U-Net once, in a full batch.
        localization: for all prompts: at least, if none of them is memorized, and at most, if all are and
            need as many neurons as the template prompts of SD v1-4 do.
        images: drawing what is compared before and after.
    """

    a_pass: float
    localization: tuple[float, float]
    images: float

    @property
    def is_long(self) -> bool:
        """Whether a user should be told before waiting for it."""
        return sum(self.localization) / 2 + self.images > _HOUR / 2

    def described(self, num_prompts: int) -> str:
        """The estimate in words."""
        fewest, most = map(duration, self.localization)
        return (
            f"A pass of the U-Net takes {self.a_pass:.2g} s here, so that {num_prompts} prompts will take {fewest} "
            f"(none is memorized) to {most} (all are), the images {duration(self.images)}. The run goes on, and can be "
            "stopped and taken up again; --limit N examines the first N prompts."
        )


def estimate_run(predictor: NoisePredictor, num_prompts: int, verification: VerificationSettings) -> TimeEstimate:
    """Measure the first passes and reckon how long a run will take.

    Args:
        predictor: the model.
        num_prompts: prompts to localize.
        verification: the images that are drawn.
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
    a_pass = seconds / len(latents)
    detection = predictor.settings.num_samples
    images = min(num_prompts, verification.max_prompts) * verification.images_per_prompt
    # Guidance takes two passes a step, and every image is drawn before and after.
    passes_for_images = images * verification.num_inference_steps * 2 * 2
    return TimeEstimate(
        a_pass=a_pass,
        localization=(num_prompts * detection * a_pass, num_prompts * (detection + _MOST_TRIALS) * a_pass),
        images=passes_for_images * a_pass,
    )


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days in words."""
    for unit, name in ((24 * _HOUR, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
