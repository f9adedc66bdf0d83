"""What attention takes from the value neurons, on captions' ways from noise to image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nemo_prune.engine.compensation import Moments
from nemo_prune.engine.diffusion import NoisePredictor, draw_latents
from nemo_prune.engine.layers import projection_behind
from nemo_prune.engine.memory import in_parts
from nemo_prune.engine.ordinary import points_of_ways

# Points on the way of each caption from noise to image, and the seed of the ways.
POINTS, SEED = 8, 3001


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
    counting = shares.nonzero().flatten()
    # All captions' latents are not kept for good.
    first = draw_latents(predictor.pipe.unet, len(texts), SEED)
    weighing = shares[counting] / (shares.sum() * POINTS)

    def walk(part: slice) -> dict[str, Moments]:
        places, weights, sums = counting[part], weighing[part], _nothing(predictor.sizes)

        def add(name: str, attended: Tensor) -> None:
            values = attended.float()
            weighted = values * (weights / values.shape[1]).to(values.device)[:, None, None]
            sums[name].mean.add_(weighted.sum(dim=(0, 1)).cpu())
            sums[name].products.add_(torch.einsum("bpi,bpj->ij", weighted, values).cpu())

        with seeing_attended(predictor, add):
            encoded = predictor.encode([texts[place] for place in places.tolist()])
            for _ in points_of_ways(predictor, encoded, first[places], POINTS):
                pass
        return sums

    total = _nothing(predictor.sizes)
    for sums in in_parts(walk, len(counting), at_once, "the model and one sample"):
        for name, each in sums.items():
            total[name].mean.add_(each.mean)
            total[name].products.add_(each.products)
    return {name: Moments(each.mean.float(), each.products.float()) for name, each in total.items()}


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
