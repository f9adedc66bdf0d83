"""What attention takes from the value neurons, on captions' ways from noise to image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from nemo_prune.engine.compensation import Moments
from nemo_prune.engine.diffusion import NoisePredictor, draw_latents
from nemo_prune.engine.layers import projection_behind
from nemo_prune.engine.memory import in_parts
from nemo_prune.engine.ordinary import points_of_ways

# Points on the way of each caption from noise to image, and the seed of the ways.
POINTS, SEED = 8, 3001
# Captions whose first latents are drawn at once.
_CAPTIONS_DRAWN = 512


@torch.no_grad()
def attended_moments(
    predictor: NoisePredictor, texts: Sequence[str], weights: Sequence[float] | None = None, at_once: int = 32
) -> dict[str, Moments]:
    """Means and products of what attention takes from the neurons of a layer, over places, captions and their ways.

    One sample pass a point of a caption that counts. Where a caption's way begins depends on its place alone.

    Args:
        predictor: the model; its value projections are searched.
        texts: captions.
        weights: of the captions in the mean over them, some above 0; all count the same unless given.
        at_once: captions that go through the U-Net together.

    Returns:
        Dotted module name -> moments, on the CPU.

    Raises:
        ModelError: the device's memory does not take a single sample.
    """
    shares = torch.ones(len(texts)) if weights is None else torch.tensor(weights)
    shares = shares / (shares.sum() * POINTS)
    generator, total = torch.Generator().manual_seed(SEED), _nothing(predictor.sizes)
    # Those of 10,000 captions take 655 MB.
    for start in range(0, len(texts), _CAPTIONS_DRAWN):
        group = slice(start, start + _CAPTIONS_DRAWN)
        first = draw_latents(predictor.pipe.unet, len(texts[group]), generator)
        counting = shares[group].nonzero().flatten()
        walk = partial(
            _walk, predictor, [texts[start + place] for place in counting.tolist()], first[counting],
            shares[group][counting],
        )  # fmt: skip
        for sums in in_parts(walk, len(counting), at_once, "the model and one sample"):
            for name, each in sums.items():
                total[name].mean.add_(each.mean)
                total[name].products.add_(each.products)
    return {name: Moments(each.mean.float(), each.products.float()) for name, each in total.items()}


def _walk(
    predictor: NoisePredictor, texts: Sequence[str], latents: Tensor, weights: Tensor, part: slice
) -> dict[str, Moments]:
    """What some of the captions add to the moments, in float64."""
    sums = _nothing(predictor.sizes)

    def add(name: str, attended: Tensor) -> None:
        values = attended.float()
        weighted = values * (weights[part] / values.shape[1]).to(values.device)[:, None, None]
        sums[name].mean.add_(weighted.sum(dim=(0, 1)).cpu())
        sums[name].products.add_(torch.einsum("bpi,bpj->ij", weighted, values).cpu())

    with seeing_attended(predictor, add):
        for _ in points_of_ways(predictor, predictor.encode(texts[part]), latents[part], POINTS):
            pass
    return sums


def _nothing(sizes: Mapping[str, int]) -> dict[str, Moments]:
    """Sums that nothing was added to yet, in float64."""
    return {
        name: Moments(torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))
        for name, size in sizes.items()
    }


@contextmanager
def seeing_attended(predictor: NoisePredictor, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show what attention takes from the value neurons in every pass, while the context lasts.

    Args:
        predictor: the model; its value projections are searched.
        see: called with the dotted module name of a value projection and what is taken, [batch, places, out_features].
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: see(name, inputs[0])

    handles = []
    try:
        for name in predictor.layers:
            output = projection_behind(predictor.pipe.unet, name)
            handles.append(output.register_forward_pre_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_tensors(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Moments as tensors by name, as a file keeps them."""
    found = {f"{name}.mean": each.mean for name, each in moments.items()}
    return found | {f"{name}.products": each.products for name, each in moments.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Moments]:
    """The inverse of :func:`as_tensors`."""
    names = [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
    return {name: Moments(tensors[f"{name}.mean"], tensors[f"{name}.products"]) for name in names}
