"""What networks say of images, where their weights are given: alignment by CLIP, distances of distributions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import linalg
from torch import Tensor

from nemo_prune.errors import SettingsError

_FEATURE_SIDE = 299
_BATCH = 16
_FEWEST = 8


class Alignment:
    """The cosine of CLIP's two towers.

    Args:
        folder: a folder of transformers with a CLIP model and its processor.
        device: torch device.

    Raises:
        SettingsError: it can't be loaded.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{folder} holds no CLIP model: {error}. Give a folder of transformers.") from error
        self._device = device

    @torch.no_grad()
    def __call__(self, text: str, images: Sequence[Image.Image]) -> list[float]:
        """Cosine of a caption with each image."""
        inputs = self._processor(text=[text], images=list(images), return_tensors="pt", padding=True, truncation=True)
        output = self._model(**inputs.to(self._device))
        return (output.image_embeds @ output.text_embeds.T)[:, 0].tolist()


def image_features(file: Path, images: Sequence[Image.Image]) -> Tensor:
    """Features of images by a TorchScript network, such as Inception's for FID, [images, width].

    Args:
        file: it takes images of 299 pixels in -1..1.
        images: any size.

    Raises:
        SettingsError: the file is not such a network.
    """
    try:
        network = torch.jit.load(str(file)).eval()
        found = []
        with torch.no_grad():
            for start in range(0, len(images), _BATCH):
                found.append(network(_pixels(images[start : start + _BATCH])).flatten(1).float())
        return torch.cat(found)
    except (RuntimeError, ValueError) as error:
        raise SettingsError(f"{file} does not describe images of {_FEATURE_SIDE} pixels: {error}") from error


def distances(a: Tensor, b: Tensor) -> Mapping[str, float] | None:
    """Fréchet and kernel distance of two sets of features (FID, KID); None for fewer than eight images each.

    Args:
        a: [images, width].
        b: [images, width].
    """
    if min(len(a), len(b)) < _FEWEST:
        return None
    return {"FID": _frechet(a.double().numpy(), b.double().numpy()), "KID": _kernel(a.double(), b.double())}


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.atleast_2d(np.cov(each, rowvar=False)) for each in (a, b)]
    # Real up to rounding: a product of two positive matrices.
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root))


def _kernel(a: Tensor, b: Tensor) -> float:
    """Unbiased squared distance with the cubic polynomial kernel (arXiv 1801.01401)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [(kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(within[0] + within[1] - 2 * kernel(a, b).mean())


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    size = (_FEATURE_SIDE, _FEATURE_SIDE)
    arrays = [np.asarray(each.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for each in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
