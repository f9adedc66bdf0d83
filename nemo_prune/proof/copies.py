"""How much images look alike: one interface, a measure that is always there, and copy detectors from a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

from nemo_prune.errors import SettingsError
from nemo_prune.files.hashing import file_hash

_SIDE = 64
_SCALES = (1 / 3, 1 / 3, 1 / 3)
# The window of the SSIM, in pixels, and the constants that keep it finite for values in 0..1.
_SIGMA, _REACH = 1.5, 5
_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2
_PAIRS_AT_ONCE = 256
# Few, because the first ones often decide.
_PAIRS_SEARCHED = 32
_DETECTOR_SIDE = 320
_DETECTOR_BATCH = 32
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A tile of less deviation (of 0..1) shows sky or wall, which any two pictures share.
_FLATTEST_TILE = 0.06


@dataclass(frozen=True)
class Yardstick:
    """What images were compared by. A cut belongs to one variant and to no other.

    Attributes:
        name: what it is called.
        cut: similarity from which an image counts as a copy.
        file: name of the detector's file; None for what the package brings.
        sha256: of that file.
    """

    name: str
    cut: float
    file: str | None = None
    sha256: str | None = None


class ImageSimilarity(Protocol):
    """Compares images.

    Attributes:
        yardstick: its name, variant and cut.
    """

    yardstick: Yardstick

    def describe(self, images: Sequence[Image.Image]) -> Tensor:
        """What is compared of images, [images, ...], on the CPU."""
        ...

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarity of every a with every b, [A, B], at most 1.

        Args:
            a: descriptions [A, ...].
            b: descriptions [B, ...].
        """
        ...

    def highest(self, a: Tensor, b: Tensor, least: float) -> float:
        """The highest similarity of any a with any b.

        Args:
            a: descriptions [A, ...].
            b: descriptions [B, ...].
            least: a similarity below it need not be exact: any number may stand for it that is not less, and not above.
        """
        ...


class StructuralSimilarity:
    """The lower of multi-scale SSIM at equal contrast and the correlation of the pixels, in colour, at 64 pixels.

    SSIM alone takes any two dark or flat pictures for alike, and a washed-out image for any plain picture; correlation
    alone takes any two pictures of the same layout of colours.

    Args:
        cut: similarity from which an image counts as a copy.
    """

    def __init__(self, cut: float = 0.5) -> None:
        self.yardstick = Yardstick(f"multi-scale SSIM at equal contrast and correlation, at {_SIDE} pixels", cut)

    def describe(self, images: Sequence[Image.Image]) -> Tensor:
        """Pixels [images, 3, 64, 64], float32 in 0..1."""
        return pixels(images, _SIDE) if images else torch.zeros(0, 3, _SIDE, _SIDE)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSimilarity.compare`."""
        values = correlation(a, b)
        # SSIM is at least 0 here, so that where the correlation is below 0 it is the lower one.
        rows, columns = (values > 0).nonzero(as_tuple=True)
        for row, column in zip(rows.split(_PAIRS_AT_ONCE), columns.split(_PAIRS_AT_ONCE), strict=True):
            alike = multiscale_ssim(*at_equal_contrast(a[row], b[column]))
            values[row, column] = torch.minimum(values[row, column], alike)
        return values

    def highest(self, a: Tensor, b: Tensor, least: float) -> float:
        """See :meth:`ImageSimilarity.highest`; no pair is above its correlation, so the highest of these come first."""
        bounds, order = correlation(a, b).flatten().sort(descending=True)
        best = 0.0
        for bound, pairs in zip(bounds.split(_PAIRS_SEARCHED), order.split(_PAIRS_SEARCHED), strict=True):
            if bound[0] <= max(best, least):
                return max(best, float(bound[0]))
            alike = multiscale_ssim(*at_equal_contrast(a[pairs // len(b)], b[pairs % len(b)]))
            found = torch.minimum(bound, alike)
            best = max(best, float(found.max()))
        return best


class CopyDetector:
    """A network that describes images for copy detection, such as SSCD; the cosine of two descriptions counts.

    Args:
        file: TorchScript (``.pt``, ``.torchscript``) or ONNX (``.onnx``, needs ``onnxruntime``). It takes images of 320
            pixels normalised as for ImageNet, and gives one vector each, as SSCD's published files do.
        cut: similarity from which an image counts as a copy.
        device: torch device of a TorchScript file.

    Raises:
        SettingsError: the file is missing, or is not such a network.
    """

    def __init__(self, file: Path, cut: float = 0.7, device: str = "cpu") -> None:
        if not file.is_file():
            raise SettingsError(f"There is no copy detector at {file}. Give a TorchScript or ONNX file of SSCD.")
        self.yardstick = Yardstick("copy detector (cosine of its descriptions)", cut, file.name, file_hash(file))
        self._run = _onnx(file) if file.suffix == ".onnx" else _torchscript(file, device)
        self._check(file)

    def describe(self, images: Sequence[Image.Image]) -> Tensor:
        """Descriptions [images, width] of length 1."""
        found = []
        mean, std = (torch.tensor(each)[:, None, None] for each in (_IMAGENET_MEAN, _IMAGENET_STD))
        for start in range(0, len(images), _DETECTOR_BATCH):
            shown = pixels(images[start : start + _DETECTOR_BATCH], _DETECTOR_SIDE)
            found.append(self._run((shown - mean) / std))
        return torch.nn.functional.normalize(torch.cat(found), dim=1) if found else torch.zeros(0, 1)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """See :meth:`ImageSimilarity.compare`."""
        return a @ b.T if len(a) and len(b) else torch.zeros(len(a), len(b))

    def highest(self, a: Tensor, b: Tensor, least: float) -> float:
        """See :meth:`ImageSimilarity.highest`."""
        return float((a @ b.T).max())

    def _check(self, file: Path) -> None:
        try:
            shape = tuple(self._run(torch.zeros(2, 3, _DETECTOR_SIDE, _DETECTOR_SIDE)).shape)
        except Exception as error:
            # Whatever the network raises, in whichever runtime: it is not one that can be used.
            raise SettingsError(f"{file} does not take images of {_DETECTOR_SIDE} pixels: {error}") from error
        if len(shape) != 2 or shape[0] != 2:
            raise SettingsError(f"{file} gives shape {list(shape)} for two images, expected one vector each.")


def tiles(image: Image.Image) -> list[Image.Image]:
    """Nine tiles of half the side, a quarter apart, without those that show nothing but one colour."""
    image = image.convert("RGB")
    width, height = image.size
    found = []
    for top in range(3):
        for left in range(3):
            x, y = left * width // 4, top * height // 4
            tile = image.crop((x, y, x + width // 2, y + height // 2))
            if np.asarray(tile, dtype=np.float32).std(axis=(0, 1)).max() / 255 >= _FLATTEST_TILE:
                found.append(tile)
    return found


class TiledSimilarity:
    """The highest similarity of any tile of an image with any tile of a reference: a copied part shows.

    Args:
        similarity: compares the tiles; below its cut a value is an upper bound.
        references: pictures, whose tiles are described once.
    """

    def __init__(self, similarity: ImageSimilarity, references: Sequence[Image.Image]) -> None:
        self._similarity = similarity
        described = [similarity.describe(tiles(reference)) for reference in references]
        self._described = torch.cat([each for each in described if len(each)] or [torch.zeros(0)])

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """One value per image, 0 where it or the references have no tile that shows anything."""
        return [self._highest(image) for image in images]

    def _highest(self, image: Image.Image) -> float:
        described = self._similarity.describe(tiles(image))
        if not len(described) or not len(self._described):
            return 0.0
        return self._similarity.highest(described, self._described, self._similarity.yardstick.cut)


def within_region(image: Image.Image, region: Image.Image) -> Image.Image:
    """What an image shows in a template's fixed region: the rest is grey, and cut away around it.

    Args:
        image: any size.
        region: black and white, white where the template is fixed.
    """
    region = region.convert("L").resize(image.size).point(lambda value: 255 * (value >= 128))
    grey = Image.new("RGB", image.size, (127, 127, 127))
    return Image.composite(image.convert("RGB"), grey, region).crop(region.getbbox())


def at_equal_contrast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of images [pairs, channels, height, width], of which the flatter one is stretched around its mean.

    A washed-out image has so little contrast that the constants of SSIM hide what it shows: it is like any plain
    picture. A faded copy is more like its picture when it is stretched.
    """
    means = [each.mean(dim=(1, 2, 3), keepdim=True) for each in (a, b)]
    shown = [each - mean for each, mean in zip((a, b), means, strict=True)]
    sizes = [torch.linalg.vector_norm(each, dim=(1, 2, 3), keepdim=True).clamp_min(1e-3) for each in shown]
    most = torch.maximum(*sizes)
    return tuple(mean + each * (most / size) for mean, each, size in zip(means, shown, sizes, strict=True))


def multiscale_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Of pairs of images [pairs, channels, height, width], [pairs], at least 0: what torchmetrics computes, faster.

    There the structure of the coarsest scale is taken over the whole image, and the contrast of the others without the
    border that the window reaches over; so it is here.
    """
    product = torch.ones(len(a))
    for scale, weight in enumerate(_SCALES):
        across, down = _blur(a.shape[-2]), _blur(a.shape[-1]).T
        means = [across @ each @ down for each in (a, b)]
        pairs = zip((a, b), means, strict=True)
        spreads = [(across @ (each * each) @ down - mean * mean).clamp_min(0) for each, mean in pairs]
        both = 2 * (across @ (a * b) @ down - means[0] * means[1]) + _CONTRAST
        values = both / (spreads[0] + spreads[1] + _CONTRAST)
        if scale == len(_SCALES) - 1:
            values *= (2 * means[0] * means[1] + _LUMINANCE) / (means[0] ** 2 + means[1] ** 2 + _LUMINANCE)
        else:
            values = values[..., _REACH:-_REACH, _REACH:-_REACH]
        product *= values.flatten(1).mean(dim=1).relu() ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


@cache
def _blur(size: int) -> Tensor:
    """A Gaussian blur as a matrix [size, size]; at the border the image is reflected."""
    taps = torch.exp(-(torch.arange(-_REACH, _REACH + 1) ** 2) / (2 * _SIGMA**2))
    places = torch.arange(size)[:, None] + torch.arange(-_REACH, _REACH + 1)
    places = size - 1 - (size - 1 - places.abs()).abs()
    return torch.zeros(size, size).scatter_add_(1, places, (taps / taps.sum()).expand(size, -1))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of every image with every other one, [A, B]; both are pixels [images, channels, height, width]."""
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=1)[:, None] * torch.linalg.vector_norm(b, dim=1)[None, :]
    return a @ b.T / norms.clamp_min(1e-6)


def pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """Images in colour, all of one size, [images, 3, side, side], float32 in 0..1."""
    arrays = [np.asarray(each.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)) for each in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def _torchscript(file: Path, device: str):
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise SettingsError(f"{file} is not a TorchScript file: {error}") from error

    @torch.no_grad()
    def run(pixels: Tensor) -> Tensor:
        return network(pixels.to(device)).float().cpu()

    return run


def _onnx(file: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise SettingsError(f"{file} needs onnxruntime: pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0]).float()
