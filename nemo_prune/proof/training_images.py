"""The training images that are known: opened, fetched, and refused where they are only placeholders."""

import io
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub.constants import is_offline_mode
from PIL import Image, ImageOps, UnidentifiedImageError

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.errors import PromptError

_TIMEOUT_S = 30
_MOST_BYTES = 64 << 20
_SMALLEST_SIDE = 16
# An error page is a sheet of one colour with a few letters; a product on white leaves more than that.
_LARGEST_SHEET = 0.95
_SAME_COLOUR = 3


@dataclass(frozen=True)
class TrainingImages:
    """Training images by caption.

    Attributes:
        images: caption -> its training image, RGB.
        regions: caption -> the fixed region of its template, white where it is fixed.
        not_available: caption -> why its image counts as unknown.
    """

    images: Mapping[str, Image.Image] = field(default_factory=dict)
    regions: Mapping[str, Image.Image] = field(default_factory=dict)
    not_available: Mapping[str, str] = field(default_factory=dict)


class TrainingImageFiles(Mapping[str, Image.Image]):
    """Caption -> its training image, RGB, where the corpus names a file; each is decoded whenever it is asked for.

    Thousands of them would not fit into memory.

    Args:
        prompts: the corpus.

    Raises:
        PromptError: a file is no image that can be read.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._files = {prompt.text: prompt.image for prompt in prompts if prompt.image is not None}
        for text in self:
            self[text].close()

    def __getitem__(self, text: str) -> Image.Image:
        file = self._files[text]
        try:
            return _decoded(file)
        except OSError as error:
            raise PromptError(
                f"The training image {file} can't be read: {error}. Correct the `image` column or drop it."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def fetch(address: str) -> bytes:
    """The content of an http(s) address.

    Raises:
        OSError: it can't be reached, is too large, or nothing may be fetched.
    """
    if is_offline_mode():
        raise OSError("HF_HUB_OFFLINE is set")
    if not address.startswith(("http://", "https://")):
        raise OSError("it is neither a file nor an http address")
    with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
        content = answer.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise OSError(f"it has more than {_MOST_BYTES >> 20} MiB")
    return content


def known_training_images(prompts: Sequence[Prompt], fetch: Callable[[str], bytes] = fetch) -> TrainingImages:
    """Open what the prompts name as training images and as fixed regions.

    A file that can't be read, a dead address and a placeholder all count as not available: none may pass for "not
    replicated".

    Args:
        prompts: the corpus.
        fetch: gets what an address holds.
    """
    images, regions, not_available = {}, {}, {}
    for prompt in prompts:
        addresses = (value for name, value in prompt.columns.items() if name.casefold() == "image" and "://" in value)
        source = prompt.image or next(addresses, None)
        if not source:
            continue
        try:
            content = prompt.image.read_bytes() if prompt.image else fetch(str(source))
            image = _decoded(io.BytesIO(content))
        except (OSError, ValueError) as error:
            not_available[prompt.text] = f"it can't be read: {error}"
            continue
        if reason := placeholder(image):
            not_available[prompt.text] = reason
            continue
        images[prompt.text] = image
        if prompt.region is not None:
            region = _region(prompt)
            if region is None:
                not_available[prompt.text] = "the picture in `mask` can't be read or marks nothing"
                del images[prompt.text]
            else:
                regions[prompt.text] = region
    return TrainingImages(images, regions, not_available)


def placeholder(image: Image.Image) -> str | None:
    """Why a picture is only a placeholder, such as a black one or an error page; None where it is not one."""
    if min(image.size) < _SMALLEST_SIDE:
        return f"it is {image.width}x{image.height} pixels large"
    pixels = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.NEAREST), dtype=np.int16).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    common = colours[counts.argmax()]
    share = float((abs(pixels - common).max(axis=1) <= _SAME_COLOUR).mean())
    if share == 1.0:
        return "it is a placeholder: black" if not common.any() else "it is a placeholder: one colour"
    if share >= _LARGEST_SHEET:
        return f"it is a placeholder: {share:.0%} of it is one colour"
    return None


def altered_pictures(image: Image.Image) -> list[Image.Image]:
    """Pictures as hard as a training image that a model was not trained on: mirrored or turned, colours exchanged."""
    image = image.convert("RGB")
    turned = [image.transpose(each) for each in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180)]
    found = []
    for picture in turned:
        red, green, blue = picture.split()
        found += [Image.merge("RGB", (blue, red, green)), Image.merge("RGB", (green, blue, red))]
    return found + [ImageOps.invert(picture) for picture in turned]


def _decoded(source: Path | io.BytesIO) -> Image.Image:
    """A picture in RGB.

    Raises:
        OSError: it is none, is damaged, or claims to be larger than any.
    """
    try:
        return Image.open(source).convert("RGB")
    except (ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def _region(prompt: Prompt) -> Image.Image | None:
    try:
        region = Image.open(prompt.region).convert("L")
    except (OSError, UnidentifiedImageError):
        return None
    return region if region.point(lambda value: 255 * (value >= 128)).getbbox() else None
