"""What pruned neurons still give: their mean on ordinary captions, or what the kept ones of their layer tell of them.

Attention weights sum to 1, so that a value neuron that is constant over the text adds a constant behind the attention.
A pruned neuron that gives its mean is therefore a zeroed row and a shift of the bias behind (mean ablation; as bias
compensation in arXiv 2312.11983). Kept neurons tell more than that: by least squares on what attention takes from them
(as layers are reconstructed in compression, arXiv 1707.06168) the projection behind learns to read from them what the
pruned ones gave. On memorized captions they shall tell no more than the mean: else the pictures come back that way.
Key neurons have no such form.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import BoolTensor, Tensor, nn

from nemo_prune.engine.layers import projection_behind
from nemo_prune.mask import Neuron, NeuronMask, bias_behind

# Weight of the memorized captions against ordinary ones, and of the ridge as a share of the neurons' mean variance.
MEMORIZED, RIDGE = 10.0, 0.01
# Combinations that are at hand, each of a layer.
_KEPT = 128


@dataclass(frozen=True)
class Moments:
    """What attention takes from the value neurons of a layer, over places, captions and their ways from noise to image.

    Attributes:
        mean: [out_features], float32.
        products: mean of the products of all pairs, [out_features, out_features], float32.
    """

    mean: Tensor
    products: Tensor

    def around(self, centre: Tensor) -> Tensor:
        """Mean of the products of the distances from a centre, [out_features, out_features], float64."""
        mean, centre = self.mean.double(), centre.double()
        crossed = torch.outer(mean, centre)
        return self.products.double() - crossed - crossed.T + torch.outer(centre, centre)


@dataclass(frozen=True)
class Compensation:
    """What stands in for pruned value neurons.

    For pruned neurons J and kept ones K of a layer, C minimises |z_J - mean - C (z_K - mean)|^2 over ordinary captions
    plus a weight times |C (z_K - mean)|^2 over memorized ones; z is what attention takes from the neurons.

    Attributes:
        ordinary: dotted module name -> moments on ordinary captions.
        memorized: the same on memorized ones, of the layers where kept neurons are held; None where pruned neurons give
            their mean and no more.
    """

    ordinary: Mapping[str, Moments]
    memorized: Mapping[str, Moments] | None = None
    _known: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_combining(self) -> bool:
        """Whether kept neurons tell more than means."""
        return self.memorized is not None

    @property
    def means(self) -> dict[str, Tensor]:
        """Dotted module name -> the mean of every neuron, [out_features]."""
        return {name: moments.mean for name, moments in self.ordinary.items()}

    def stand_in(self, layer: str, pruned: BoolTensor) -> tuple[Tensor, Tensor]:
        """What a layer's pruned neurons are taken to give: a constant, and a combination of all that it keeps.

        Args:
            layer: dotted module name.
            pruned: [out_features], on the CPU.

        Returns:
            The combination C [pruned neurons, out_features], 0 at pruned ones, and the constant [pruned neurons], both
            float64 on the CPU.
        """
        asked = layer, tuple(pruned.nonzero().flatten().tolist())
        if asked not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[asked] = self._solved(layer, pruned)
        return self._known[asked]

    def _solved(self, layer: str, pruned: BoolTensor) -> tuple[Tensor, Tensor]:
        usual, kept = self.ordinary[layer], ~pruned
        mean, combination = usual.mean.double(), torch.zeros(int(pruned.sum()), len(pruned), dtype=torch.float64)
        if self.is_combining and kept.any():
            spread = usual.around(usual.mean)
            held = spread.clone()
            if layer in self.memorized:
                held += MEMORIZED * self.memorized[layer].around(usual.mean)
            held.diagonal().add_(RIDGE * spread.diagonal().mean())
            combination[:, kept] = torch.linalg.solve(held[kept][:, kept], spread[kept][:, pruned]).T
        return combination, mean[pruned] - combination @ mean

    def in_weights(self, mask: NeuronMask, unet: nn.Module) -> NeuronMask:
        """A mask that also says what it changes behind the attention.

        Args:
            mask: value neurons.
            unet: the unpruned one.
        """
        shifts, combinations = {}, {}
        for name, pruned in mask.layers.items():
            if pruned.any():
                combination, constant = self.stand_in(name, pruned)
                behind = projection_behind(unet, name).weight.detach().cpu().double()
                shifts[bias_behind(name)] = (behind[:, pruned] @ constant).float()
                if combination.any():
                    combinations[name] = combination.float()
        return replace(mask, shifts=shifts, combinations=combinations)

    @contextmanager
    def standing_in(self, unet: nn.Module, suppressed: Sequence[Collection[Neuron]]) -> Iterator[None]:
        """Give in place of each sample's suppressed neurons what stands in for them, while the context lasts.

        Args:
            unet: the unpruned one.
            suppressed: the neurons, one collection a sample of the batch.
        """
        samples: dict[frozenset[Neuron], list[int]] = {}
        for sample, neurons in enumerate(suppressed):
            samples.setdefault(frozenset(neurons), []).append(sample)
        sizes = {name: len(moments.mean) for name, moments in self.ordinary.items()}
        changes: dict[str, list[tuple]] = {}
        for neurons, places in samples.items():
            for name, pruned in NeuronMask.from_neurons(neurons, sizes).layers.items():
                if pruned.any():
                    changes.setdefault(name, []).append((places, pruned, *self.stand_in(name, pruned)))
        handles = []
        try:
            for name, of_layer in changes.items():
                handles.append(projection_behind(unet, name).register_forward_pre_hook(_replacing(of_layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _replacing(changes: Sequence[tuple[Sequence[int], BoolTensor, Tensor, Tensor]]):
    """A hook that gives some samples' pruned neurons a combination of their others and a constant."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        attended = inputs[0].clone()
        for places, pruned, combination, constant in changes:
            given = attended[places] @ combination.T.to(attended) + constant.to(attended)
            there = attended[places]
            there[..., pruned.to(attended.device)] = given
            attended[places] = there
        return (attended, *inputs[1:])

    return hook
