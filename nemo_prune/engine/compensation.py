"""What neurons are taken to give where some are pruned: means, or what the kept ones of their layer tell.

Attention weights sum to 1, so that a value neuron that is constant over the text adds a constant behind the attention.
A pruned neuron that gives its mean on ordinary captions is therefore a zeroed row and a shift of the bias behind (mean
ablation; as bias compensation in arXiv 2312.11983). Kept neurons tell more than that: by least squares on what
attention takes from them (as layers are reconstructed in compression, arXiv 1707.06168) the projection behind learns to
read from them what the pruned ones gave. On memorized captions it shall read little but means: from kept neurons in
place of pruned ones, else the pictures come back that way; and, with less weight, from kept neurons for themselves,
because what they give there still resembles a picture. So are layers held in which nothing is pruned. Key neurons have
no such form.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import BoolTensor, Tensor, nn

from nemo_prune.engine.layers import projection_behind
from nemo_prune.mask import Neuron, NeuronMask, bias_behind

# Weights of memorized captions against ordinary ones: in what stands in for pruned neurons, and in what kept ones give.
STANDING_IN, GIVEN = 1.0, 0.1
# Weight of the ridge, which leaves things as they are, as a share of the neurons' mean variance.
RIDGE = 0.01
# Combinations that are at hand, each of a layer.
_KEPT = 32


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

    def mixed_with(self, other: "Moments", share: float) -> "Moments":
        """The moments over these captions and others, the others with a share of the weight, 0 to 1."""
        return Moments(torch.lerp(self.mean, other.mean, share), torch.lerp(self.products, other.products, share))


@dataclass(frozen=True)
class Compensation:
    """What neurons are taken to give where some are pruned: those of the pruned ones' layers, or all that are held.

    With z what attention takes from the neurons, d its distance from the mean on ordinary captions and K the kept ones,
    every neuron i is taken to give mean_i + C_i d_K. C_i minimises |d_i - C_i d_K|^2 over ordinary captions, plus a
    weight times |C_i d_K|^2 over memorized ones, plus a ridge.

    Attributes:
        ordinary: dotted module name -> moments on ordinary captions.
        memorized: the same on memorized ones, of the layers where these are held, which is done wherever any neuron is
            pruned; None where pruned neurons give their mean and no more.
        hold: by how much more than ``GIVEN`` and ``STANDING_IN`` they weigh, see :mod:`nemo_prune.engine.holding`;
            below 1 kept neurons alone are held less.
    """

    ordinary: Mapping[str, Moments]
    memorized: Mapping[str, Moments] | None = None
    hold: float = 1.0
    _known: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_combining(self) -> bool:
        """Whether kept neurons tell more than means."""
        return self.memorized is not None

    def held_by(self, share: float) -> "Compensation":
        """The same with memorized captions held by a share of how much they are."""
        return replace(self, hold=share * self.hold)

    @property
    def means(self) -> dict[str, Tensor]:
        """Dotted module name -> the mean of every neuron, [out_features]."""
        return {name: moments.mean for name, moments in self.ordinary.items()}

    def taken(self, layer: str, pruned: BoolTensor) -> tuple[Tensor, Tensor]:
        """What a layer's neurons are taken to give, beside what the kept ones give.

        Args:
            layer: dotted module name.
            pruned: [out_features], on the CPU.

        Returns:
            The combination of kept neurons that is added to each neuron, [out_features, out_features] float32, 0 from
            pruned ones, and the constant that is, [out_features] float64; both on the CPU.
        """
        asked = layer, tuple(pruned.nonzero().flatten().tolist())
        if asked not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[asked] = self._solved(layer, pruned)
        return self._known[asked]

    def _solved(self, layer: str, pruned: BoolTensor) -> tuple[Tensor, Tensor]:
        usual, kept = self.ordinary[layer], ~pruned
        mean, size = usual.mean.double(), len(pruned)
        added = torch.zeros(size, size, dtype=torch.float64)
        if self.is_combining and kept.any():
            spread = usual.around(usual.mean)
            theirs = torch.zeros_like(spread)
            if layer in self.memorized:
                theirs = self.memorized[layer].around(usual.mean)
            # Where nothing varies there is nothing to solve for, and any ridge does.
            ridge = RIDGE * (float(spread.diagonal().mean()) or 1.0) * torch.eye(size, dtype=torch.float64)
            stands_in, gives = max(1.0, self.hold) * STANDING_IN, self.hold * GIVEN
            for neurons, weight, aim in ((pruned, stands_in, spread), (kept, gives, -gives * theirs)):
                given = (spread + weight * theirs + ridge)[kept][:, kept]
                added[neurons.nonzero(), kept.nonzero().T] = torch.linalg.solve(given, aim[kept][:, neurons]).T
        combination = added.float()
        constant = -combination.double() @ mean
        constant[pruned] += mean[pruned]
        return combination, constant

    def in_weights(self, mask: NeuronMask, unet: nn.Module) -> NeuronMask:
        """A mask that also says what it changes behind the attention.

        Args:
            mask: value neurons.
            unet: the unpruned one.
        """
        shifts, combinations = {}, {}
        for name, pruned in self._changed_by(mask):
            combination, constant = self.taken(name, pruned)
            behind = projection_behind(unet, name).weight.detach().cpu().double()
            if constant.any():
                shifts[bias_behind(name)] = (behind @ constant).float()
            if combination.any():
                combinations[name] = combination
        return replace(mask, shifts=shifts, combinations=combinations)

    @contextmanager
    def standing_in(self, unet: nn.Module, suppressed: Sequence[Collection[Neuron]]) -> Iterator[None]:
        """Give what each sample's neurons are taken to give with some suppressed, while the context lasts.

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
            for name, pruned in self._changed_by(NeuronMask.from_neurons(neurons, sizes)):
                changes.setdefault(name, []).append((places, pruned, *self.taken(name, pruned)))
        handles = []
        try:
            for name, of_layer in changes.items():
                handles.append(projection_behind(unet, name).register_forward_pre_hook(_replacing(of_layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _changed_by(self, mask: NeuronMask) -> list[tuple[str, BoolTensor]]:
        """The layers of a mask in which anything is taken: all where neurons are held, else those with pruned ones."""
        is_held = bool(self.memorized) and mask.num_neurons > 0
        return [(name, pruned) for name, pruned in mask.layers.items() if is_held or pruned.any()]


def _replacing(changes: Sequence[tuple[Sequence[int], BoolTensor, Tensor, Tensor]]):
    """A hook by which some samples' kept neurons are read by all, and pruned ones by none."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        attended = inputs[0].clone()
        for places, pruned, combination, constant in changes:
            kept = attended[places].masked_fill(pruned.to(attended.device), 0.0)
            attended[places] = kept + kept @ combination.T.to(attended) + constant.to(attended)
        return (attended, *inputs[1:])

    return hook
