"""The attack of DoRI (arXiv 2507.16880): a text embedding is optimised until the model gives a picture back."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from nemo_prune.engine.memory import with_less_at_once
from nemo_prune.proof.drawing import Drawing, draw, encode, image_latents
from nemo_prune.proof.intervals import Rate
from nemo_prune.proof.passes import PassCounter
from nemo_prune.proof.replication import ReplicationJudge

Start = Literal["caption", "noise", "ordinary caption"]


@dataclass(frozen=True)
class AttackSettings:
    """The published attack, and how its success is looked at.

    Attributes:
        steps: Adam steps.
        learning_rate: of Adam.
        batch_size: noises and timesteps per step, drawn afresh.
        looks: steps after which images are drawn; the attack ends once one is a copy.
        images_per_look: images that are drawn then.
        drawing_steps: DDIM steps of these.
    """

    steps: int = 50
    learning_rate: float = 0.1
    batch_size: int = 8
    looks: tuple[int, ...] = (0, 10, 20, 30, 40, 50)
    images_per_look: int = 2
    drawing_steps: int = 20

    def passes(self, guidance_scale: float, steps: int | None = None) -> int:
        """Passes that one attack costs; the way back through the U-Net counts as another pass.

        Args:
            guidance_scale: of the images that are drawn.
            steps: after which it ends, because a copy was drawn; None for all of them.
        """
        drawing = Drawing("ddim", self.drawing_steps, guidance_scale)
        steps = self.steps if steps is None else steps
        looks = sum(look <= steps for look in self.looks)
        return 2 * steps * self.batch_size + looks * self.images_per_look * drawing.passes


@dataclass(frozen=True)
class AttackRun:
    """One attack.

    Attributes:
        model: which model was attacked.
        memorized: whether the target is a memorized picture, or one that no model was trained on.
        start: where the embedding began.
        steps: steps after which a copy was drawn first; None where none was.
        similarity: highest similarity to the target at any look.
        curve: highest similarity to the target at each look, as far as it went.
    """

    model: str
    memorized: bool
    start: str
    steps: int | None
    similarity: float
    curve: tuple[float, ...]


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack came to.

    Attributes:
        steps: steps after which a copy was drawn first; None where none was.
        curve: highest similarity to the target at each look, as far as it went.
        prompt_embeds: the embedding at the end [positions, width], float32.
    """

    steps: int | None
    curve: tuple[float, ...]
    prompt_embeds: Tensor


@dataclass(frozen=True)
class AttackResult:
    """All attacks of one model on one sort of target.

    Attributes:
        model: which model.
        memorized: whether the targets are memorized pictures.
        start: where the embeddings began.
        came_back: how many came back within the steps.
        median_steps: median steps to a copy; None where fewer than half came back, so that it is above ``steps``.
        steps: the steps that each had.
        looks: steps after which images were drawn.
        curve: mean over the attacks of the highest similarity so far, one value per look.
    """

    model: str
    memorized: bool
    start: str
    came_back: Rate
    median_steps: float | None
    steps: int
    looks: tuple[int, ...]
    curve: tuple[float, ...]


def attack(
    pipe: StableDiffusionPipeline,
    target: Image.Image,
    text: str,
    start: Start,
    ordinary: str,
    judge: ReplicationJudge,
    guidance_scale: float,
    settings: AttackSettings,
    counter: PassCounter,
    seed: int,
) -> AttackOutcome:
    """Optimise an embedding for a picture, and look from time to time whether the picture comes back.

    Args:
        pipe: the model; its weights stay as they are.
        target: the picture.
        text: the caption that a start at ``caption`` begins with.
        start: where the embedding begins.
        ordinary: the caption of a start at ``ordinary caption``.
        judge: compares images with the target.
        guidance_scale: of the images that are drawn.
        settings: the attack's.
        counter: is told of the way back through the U-Net.
        seed: of noises, timesteps and a start at ``noise``.
    """
    generator = torch.Generator().manual_seed(seed)
    embeds = _start(pipe, text, start, ordinary, generator).requires_grad_(True)
    optimiser = torch.optim.Adam([embeds], lr=settings.learning_rate)
    target_latents = image_latents(pipe, [target])
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    drawing = Drawing("ddim", settings.drawing_steps, guidance_scale)
    trainable = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    curve: list[float] = []
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for step in range(settings.steps + 1):
            if step in settings.looks:
                seeds = [seed + 1 + each for each in range(settings.images_per_look)]
                images = draw(pipe, embeds.detach(), drawing, seeds)
                curve.append(max(judge.similarity_to(target, images)))
                if curve[-1] >= judge.cut:
                    return AttackOutcome(step, tuple(curve), embeds.detach())
            if step < settings.steps:
                _learn_from(pipe, scheduler, target_latents, embeds, settings.batch_size, generator)
                counter.passes += settings.batch_size
                optimiser.step()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return AttackOutcome(None, tuple(curve), embeds.detach())


def summarize_attacks(runs: Sequence[AttackRun], settings: AttackSettings) -> list[AttackResult]:
    """Bring attacks together by model, sort of target and start."""
    by_sort: dict[tuple[str, bool, str], list[AttackRun]] = {}
    for run in runs:
        by_sort.setdefault((run.model, run.memorized, run.start), []).append(run)
    results = []
    for (model, memorized, start), group in by_sort.items():
        steps = [run.steps for run in group]
        curves = [_highest_so_far(run.curve, len(settings.looks)) for run in group]
        results.append(
            AttackResult(
                model=model,
                memorized=memorized,
                start=start,
                came_back=Rate.of(sum(step is not None for step in steps), len(steps)),
                median_steps=_median_steps(steps),
                steps=settings.steps,
                looks=settings.looks,
                curve=tuple(sum(values) / len(values) for values in zip(*curves, strict=True)),
            )
        )
    return results


def work_ratio(results: Sequence[AttackResult], model: str, start: str = "caption") -> tuple[float, bool] | None:
    """Median steps to a memorized picture over median steps to a picture that was never trained on.

    Args:
        results: of :func:`summarize_attacks`.
        model: which model.
        start: where the embeddings began.

    Returns:
        The ratio, and whether the true one may be lower, because the controls did not come back within the steps. None
        where it can't be told, because memorized pictures did not come back, or nothing was measured.
    """
    found = {each.memorized: each for each in results if each.model == model and each.start == start}
    if set(found) != {True, False} or found[True].median_steps is None:
        return None
    control = found[False].median_steps
    return found[True].median_steps / (control or found[False].steps), control is None


def _start(pipe: StableDiffusionPipeline, text: str, start: Start, ordinary: str, generator: torch.Generator) -> Tensor:
    if start == "caption":
        return encode(pipe, text).clone()
    embeds = encode(pipe, ordinary)
    if start == "ordinary caption":
        return embeds.clone()
    return embeds.mean() + embeds.std() * torch.randn(embeds.shape, generator=generator).to(embeds.device)


def _learn_from(
    pipe: StableDiffusionPipeline,
    scheduler: DDIMScheduler,
    target: Tensor,
    embeds: Tensor,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Add the gradient of the diffusion loss on fresh noises to the embedding; in parts where memory is short."""
    device, dtype = pipe.unet.device, pipe.unet.dtype
    noise = torch.randn((batch_size, *target.shape[1:]), generator=generator).to(device)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator).to(device)
    latents = target.expand(batch_size, -1, -1, -1)
    noisy, wanted = (
        scheduler.add_noise(latents, noise, timesteps),
        training_target(scheduler, latents, noise, timesteps),
    )

    def learn(at_once: int) -> None:
        embeds.grad = None
        for part in torch.arange(batch_size).split(at_once):
            asked = embeds.to(dtype).expand(len(part), -1, -1)
            predicted = pipe.unet(noisy[part].to(dtype), timesteps[part], encoder_hidden_states=asked).sample.float()
            loss = torch.nn.functional.mse_loss(predicted, wanted[part])
            (loss * (len(part) / batch_size)).backward()

    with_less_at_once(learn, batch_size, "an attack's way back through the U-Net")


def training_target(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a model is trained to predict: the noise, the velocity or the sample."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return latents if scheduler.config.prediction_type == "sample" else noise


def _highest_so_far(curve: Sequence[float], length: int) -> list[float]:
    highest = [max(curve[: place + 1]) for place in range(len(curve))]
    return highest + highest[-1:] * (length - len(highest))


def _median_steps(steps: Sequence[int | None]) -> float | None:
    """Those that did not come back count as longer than any."""
    middle = median(float("inf") if step is None else step for step in steps)
    return None if middle == float("inf") else middle
