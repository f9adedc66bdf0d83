"""Images before and after pruning: drawn, compared with training images and with each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from nemo_prune.engine.diffusion import draw_latents
from nemo_prune.proof.copies import StructuralSimilarity, at_equal_contrast, correlation, pixels
from nemo_prune.proof.drawing import draw_from
from nemo_prune.settings import VerificationSettings

_COMPARED_SIDE = 64


def draw_images(pipe: StableDiffusionPipeline, text: str, settings: VerificationSettings) -> list[Image.Image]:
    """Images of one prompt, by the pipeline's own scheduler; the same latents in every call.

    Where memory is short fewer are drawn at once.

    Raises:
        ModelError: the device's memory does not take a single image.
    """
    latents = draw_latents(pipe.unet, settings.images_per_prompt, settings.seed)
    return draw_from(pipe, text, latents, settings.num_inference_steps, settings.guidance_scale)


def as_compared(image: Image.Image) -> Image.Image:
    """A picture as it is compared, in colour and 64 pixels high and wide; one that is so already stays the same."""
    return image.convert("RGB").resize((_COMPARED_SIDE, _COMPARED_SIDE), Image.Resampling.LANCZOS)


def image_similarities(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """SSIM of images and references in colour, all resized to 64 pixels, [images, references]."""
    a, b = _pixels(images), _pixels(references)
    return _ssim(a.repeat_interleave(len(b), dim=0), b.repeat(len(a), 1, 1, 1)).reshape(len(a), len(b))


def copy_similarities(images: Sequence[Image.Image], training_images: Sequence[Image.Image]) -> Tensor:
    """How much images look like copies of training images, [images, training images], at most 1.

    The lower of SSIM at equal contrast and the correlation of the pixels in colour, both at 64 pixels: SSIM alone takes
    any two dark or flat pictures for alike, whatever they show.
    """
    a, b = _pixels(images), _pixels(training_images)
    alike = _ssim(*at_equal_contrast(a.repeat_interleave(len(b), dim=0), b.repeat(len(a), 1, 1, 1)))
    return torch.minimum(alike.reshape(len(a), len(b)), correlation(a, b))


def nearest_copies(images: Sequence[Image.Image], training_images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """The highest of each image's :func:`copy_similarities`, and which training image it is of, both [images].

    No copy is nearer than its correlation, so that SSIM is taken of the most correlated ones alone.
    """
    a, b = _pixels(images), _pixels(training_images)
    correlations, order = correlation(a, b).sort(dim=1, descending=True, stable=True)
    highest, nearest = torch.full((len(images),), -2.0), order[:, 0].clone()
    for bounds, candidates in zip(correlations.T, order.T, strict=True):
        rows = (bounds > highest).nonzero().flatten()
        if not len(rows):
            break
        similarities = _ssim(*at_equal_contrast(a[rows], b[candidates[rows]])).minimum(bounds[rows])
        nearer = similarities > highest[rows]
        highest[rows[nearer]], nearest[rows[nearer]] = similarities[nearer], candidates[rows[nearer]]
    return highest, nearest


class Likeness:
    """How much images look like any of some pictures, by either yardstick: that of images before and after a pruning,
    :func:`nearest_copies`, and that of the evidence, :class:`~nemo_prune.proof.copies.StructuralSimilarity`.

    Args:
        pictures: training images, or others that are not to be copied.
    """

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self._pictures, self._similarity = pictures, StructuralSimilarity()
        self._described = self._similarity.describe(pictures)

    def nearest(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """The higher of both similarities to the nearest picture, and which one that is, both [images]."""
        by_structure = self._similarity.compare(self._similarity.describe(images), self._described).max(dim=1)
        values, nearest = nearest_copies(images, self._pictures)
        is_nearer = values > by_structure.values
        return torch.maximum(values, by_structure.values), torch.where(is_nearer, nearest, by_structure.indices)


def seed_agreement(images: Sequence[Image.Image]) -> float:
    """How much one prompt's images of several seeds are copies of each other: the median of all pairs."""
    rows, columns = torch.triu_indices(len(images), len(images), offset=1)
    return float(copy_similarities(images, images)[rows, columns].median())


@dataclass(frozen=True)
class ImageEvidence:
    """Images of one prompt before and after pruning.

    Attributes:
        copies_before: share of the images that are near any of the training images, None where no
            training image is known.
        copies_after: the same after pruning.
        nearest_before: similarity of the images to the nearest training image, their median.
        nearest_after: the same after pruning.
        to_unpruned: similarity to the unpruned model's image of the same latents, their mean.
        between_seeds_before: similarity of the seeds' images to each other, their mean.
        between_seeds_after: the same after pruning.
    """

    copies_before: float | None
    copies_after: float | None
    nearest_before: float | None
    nearest_after: float | None
    to_unpruned: float
    between_seeds_before: float
    between_seeds_after: float


def compare_images(
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
            nearest, _ = nearest_copies(images, training_images)
            near[position] = float(nearest.median())
            copies[position] = float((nearest >= cut).float().mean())
    return ImageEvidence(
        copies_before=copies[0],
        copies_after=copies[1],
        nearest_before=near[0],
        nearest_after=near[1],
        to_unpruned=float(_ssim(_pixels(before), _pixels(after)).mean()),
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


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each image and the one at its place, [images]."""
    return ssim(a, b, data_range=1.0, reduction="none").reshape(-1)


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return pixels(images, _COMPARED_SIDE)
