"""What a pruned model still gives back, and what it costs: scores, images, controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from nemo_prune.engine.diffusion import NoisePredictor, draw_latents
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import ModelError
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.settings import VerificationSettings

Progress = Callable[[int, int], None]
_COMPARED_SIDE = 64
# What the rounding of float32 rows grows to on its way through the demo's U-Net is 2e-5 of the prediction.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class PromptVerification:
    """One prompt under the final mask.

    Attributes:
        prompt: its text.
        suppressed_similarity: highest similarity with and without the mask over the kept seeds of
            the detection; None where no seed was kept.
        score_before: memorization score on fresh latents, nothing suppressed.
        score_after: the same under the mask.
    """

    prompt: str
    suppressed_similarity: float | None
    score_before: float
    score_after: float


def verify_prompt(
    scorer: Scorer, localization: PromptLocalization, mask: NeuronMask, fresh_latents: Tensor
) -> PromptVerification:
    """Score a prompt again under the final mask, on the detection's latents and on fresh ones."""
    prompt, neurons = localization.prompt, frozenset(mask.neurons)
    similarity = None
    if localization.kept_seeds:
        (scored,) = scorer.score_prompts([prompt])
        similarity = max(scorer.suppressed_similarities(scored, localization.kept_seeds, neurons))
    (before,) = scorer.score_prompts([prompt], fresh_latents)
    (after,) = scorer.score_prompts([prompt], fresh_latents, neurons)
    return PromptVerification(
        prompt=prompt,
        suppressed_similarity=similarity,
        score_before=before.memorization.score,
        score_after=after.memorization.score,
    )


def noise_change(
    predictor: NoisePredictor, texts: Sequence[str], masks: Mapping[str, NeuronMask], num_samples: int = 2
) -> dict[str, float]:
    """How much masks change the noise prediction of prompts: the norm of the change over its own.

    Args:
        predictor: the unpruned model.
        texts: ordinary prompts.
        masks: name -> mask.
        num_samples: latents per prompt.

    Returns:
        Name -> relative change, the mean over prompts and latents; 0 is no change.
    """
    latents = predictor.initial_latents(num_samples=num_samples)
    changes = []
    for prompt_embeds in predictor.encode(texts):
        noise_pred = predictor.predict_noise(latents, prompt_embeds, [None, *masks.values()]).flatten(2)
        changes.append((noise_pred[1:] - noise_pred[:1]).norm(dim=-1) / noise_pred[0].norm(dim=-1))
    means = torch.stack(changes).mean(dim=(0, 2))
    return dict(zip(masks, means.tolist(), strict=True))


def matched_random_mask(mask: NeuronMask, activation: Mapping[str, Tensor], seed: int) -> NeuronMask:
    """As many random neurons as a mask has, in the same layers, as active, and outside of it.

    For each pruned neuron one is drawn among the five most alike in activation that are neither
    pruned nor drawn yet. A layer that is pruned by more than half can't be matched in full.

    Args:
        mask: the mask to match.
        activation: dotted module name -> usual activation [out_features].
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Neuron] = []
    for name, pruned in mask.layers.items():
        free = set((~pruned).nonzero().flatten().tolist())
        for index in pruned.nonzero().flatten().tolist():
            distance = (activation[name] - activation[name][index]).abs().tolist()
            alike = sorted(free, key=lambda other: distance[other])[:5]
            if alike:
                chosen = alike[int(torch.randint(len(alike), (1,), generator=generator))]
                free.remove(chosen)
                drawn.append(Neuron(name, chosen))
    return NeuronMask.from_neurons(drawn, mask.sizes)


def full_mask(sizes: Mapping[str, int]) -> NeuronMask:
    """Every neuron of every layer: the yardstick for the change that a mask makes."""
    return NeuronMask({name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()})


def check_pruned_equals_suppressed(
    predictor: NoisePredictor, pruned_pipe: StableDiffusionPipeline, mask: NeuronMask, texts: Sequence[str]
) -> None:
    """Refuse an export whose prediction is not that of the suppressed model, to the last bit.

    Scaled rows are rounded in the file, and their outputs in the live model, so that these agree within
    the dtype's rounding alone.

    Raises:
        ModelError: they differ.
    """
    pruned = NoisePredictor(pruned_pipe, predictor.settings, predictor.batch_size)
    latents = predictor.initial_latents(num_samples=2)
    allowed = max(_ROUNDING, torch.finfo(pruned_pipe.unet.dtype).eps) if predictor.scale else 0.0
    for text in texts:
        suppressed = predictor.predict_noise(latents, predictor.encode([text])[0], [mask])
        difference = (pruned.predict_noise(latents, pruned.encode([text])[0]) - suppressed).norm() / suppressed.norm()
        # Written so that NaN does not pass for agreement.
        if not difference <= allowed:
            raise ModelError(
                "The exported weights do not predict what the suppressed model does. The export is not "
                "to be trusted and was discarded; please report this."
            )


def draw_images(pipe: StableDiffusionPipeline, text: str, settings: VerificationSettings) -> list[Image.Image]:
    """Images of one prompt, by the pipeline's own scheduler; the same latents in every call."""
    latents = draw_latents(pipe.unet, settings.images_per_prompt, settings.seed)
    return pipe(
        [text] * settings.images_per_prompt,
        latents=latents.to(pipe.unet.device, pipe.unet.dtype),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    ).images


def image_similarities(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """SSIM of images and references in colour, all resized to 64 pixels, [images, references]."""
    a, b = _pixels(images), _pixels(references)
    left = a.repeat_interleave(len(b), dim=0)
    values = ssim(left, b.repeat(len(a), 1, 1, 1), data_range=1.0, reduction="none")
    return values.reshape(len(a), len(b))


def copy_similarities(images: Sequence[Image.Image], training_images: Sequence[Image.Image]) -> Tensor:
    """How much images look like copies of training images, [images, training images], at most 1.

    The lower of SSIM and the correlation of the pixels in colour, both at 64 pixels: SSIM alone takes
    any two dark or flat pictures for alike, whatever they show.
    """
    a, b = (_pixels(each).flatten(1) for each in (images, training_images))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=1)[:, None] * torch.linalg.vector_norm(b, dim=1)[None, :]
    return torch.minimum(image_similarities(images, training_images), a @ b.T / norms.clamp_min(1e-6))


def seed_agreement(images: Sequence[Image.Image]) -> float:
    """How much one prompt's images of several seeds are copies of each other: the median of all pairs."""
    rows, columns = torch.triu_indices(len(images), len(images), offset=1)
    return float(copy_similarities(images, images)[rows, columns].median())


@dataclass(frozen=True)
class ImageEvidence:
    """Images of one prompt before and after pruning.

    Attributes:
        prompt: its text.
        copies_before: share of the images that are near any of the training images, None where no
            training image is known.
        copies_after: the same after pruning.
        nearest_before: similarity of the images to the nearest training image, their median.
        nearest_after: the same after pruning.
        to_unpruned: similarity to the unpruned model's image of the same latents, their mean.
        between_seeds_before: similarity of the seeds' images to each other, their mean.
        between_seeds_after: the same after pruning.
    """

    prompt: str
    copies_before: float | None
    copies_after: float | None
    nearest_before: float | None
    nearest_after: float | None
    to_unpruned: float
    between_seeds_before: float
    between_seeds_after: float


def compare_images(
    prompt: str,
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    training_images: Sequence[Image.Image],
    cut: float,
) -> ImageEvidence:
    """Compare a prompt's images with all training images, with each other and with the unpruned ones.

    Pruning one caption can call up another training image, so all of them count, not its own alone.
    """
    near = [None, None]
    copies = [None, None]
    if training_images:
        for position, images in enumerate((before, after)):
            nearest = copy_similarities(images, training_images).amax(dim=1)
            near[position] = float(nearest.median())
            copies[position] = float((nearest >= cut).float().mean())
    return ImageEvidence(
        prompt=prompt,
        copies_before=copies[0],
        copies_after=copies[1],
        nearest_before=near[0],
        nearest_after=near[1],
        to_unpruned=float(image_similarities(before, after).diagonal().mean()),
        between_seeds_before=_between_seeds(before),
        between_seeds_after=_between_seeds(after),
    )


def save_grid(path: Path, rows: Sequence[Sequence[Image.Image | None]], side: int = 96, gap: int = 6) -> None:
    """Write rows of images as one picture; None leaves a place free."""
    columns = max(len(row) for row in rows)
    step = side + gap
    grid = Image.new("RGB", (columns * step + gap, len(rows) * step + gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                scaled = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
                grid.paste(scaled, (gap + x * step, gap + y * step))
    grid.save(path)


def _between_seeds(images: Sequence[Image.Image]) -> float:
    values = image_similarities(images, images)
    pairs = list(combinations(range(len(images)), 2))
    return float(sum(values[i, j] for i, j in pairs) / len(pairs)) if pairs else 1.0


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    size = (_COMPARED_SIDE, _COMPARED_SIDE)
    arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
