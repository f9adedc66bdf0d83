"""Suppressed neurons that keep their mean: what ordinary captions need of them, and memorized ones do not.

Attention weights sum to 1, so that a value neuron that is constant over the text adds a constant behind the attention.
A suppressed neuron that outputs its mean on ordinary captions is therefore a zeroed row and a shift of the bias behind
(mean ablation; as bias compensation in arXiv 2312.11983). Key neurons have no such form.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.memory import in_parts
from nemo_prune.engine.ordinary import points_of_ways
from nemo_prune.mask import NeuronMask, bias_behind

# Points on the way of each caption from noise to image, and the seed of the ways.
POINTS, SEED = 8, 3001


@torch.no_grad()
def attended_means(predictor: NoisePredictor, texts: Sequence[str], at_once: int = 32) -> dict[str, Tensor]:
    """What attention takes from each value neuron, the mean over places, captions and their ways from noise to image.

    One sample pass a point.

    Args:
        predictor: the model; its value projections are searched.
        texts: ordinary captions.
        at_once: captions that go through the U-Net together.

    Returns:
        Dotted module name -> float32 [out_features], on the model's device.

    Raises:
        ModelError: the device's memory does not take a single sample.
    """
    first = predictor.initial_latents(SEED, len(texts))

    def walk(part: slice) -> dict[str, Tensor]:
        taken = {name: torch.zeros(size, dtype=torch.float64) for name, size in predictor.sizes.items()}

        def add(name: str, attended: Tensor) -> None:
            taken[name].add_(attended.float().mean(dim=1).sum(dim=0).cpu())

        with seeing_attended(predictor, add):
            for _ in points_of_ways(predictor, predictor.encode(texts[part]), first[part], POINTS):
                pass
        return taken

    parts = in_parts(walk, len(texts), at_once, "the model and one sample")
    means = {name: sum(part[name] for part in parts) / (len(texts) * POINTS) for name in predictor.sizes}
    return {name: values.float().to(predictor.device) for name, values in means.items()}


def keeping_means(
    mask: NeuronMask, predictor: NoisePredictor, stored: Mapping[str, torch.dtype] | None = None
) -> NeuronMask:
    """A mask with the shifts that make of zeroed rows what the predictor's suppressed neurons output.

    Args:
        mask: value neurons.
        predictor: the unpruned model, with its means; without them the mask is given back as it is.
        stored: name of a bias -> dtype of it in the file. A shift is rounded so that the shifted bias is a number of
            this dtype: then a file and a live model of higher precision have the same.
    """
    if predictor.means is None:
        return mask
    parameters = dict(predictor.pipe.unet.named_parameters())
    weights = {name: output.weight.detach().cpu().double() for name, output in _outputs(predictor).items()}
    shifts = {
        bias_behind(name): weights[name][:, pruned] @ predictor.means[name].cpu()[pruned].double()
        for name, pruned in mask.layers.items()
        if pruned.any()
    }
    for name, dtype in (stored or {}).items():
        if name in shifts:
            bias = parameters[name].detach().cpu().double()
            shifts[name] = (bias + shifts[name]).to(dtype).double() - bias
    return replace(mask, shifts={name: shift.float() for name, shift in shifts.items()})


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
        for name, output in _outputs(predictor).items():
            handles.append(output.register_forward_pre_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(predictor: NoisePredictor) -> dict[str, nn.Linear]:
    """Dotted module name of a value projection -> the projection behind its attention."""
    unet = predictor.pipe.unet
    return {name: unet.get_submodule(bias_behind(name).removesuffix(".bias")) for name in predictor.layers}
