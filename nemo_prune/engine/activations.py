"""How strongly the neurons react to a text, and what is usual for ordinary texts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_prune.errors import MaskError


@torch.no_grad()
def neuron_activations(layers: Mapping[str, nn.Linear], prompt_embeds: Tensor) -> dict[str, Tensor]:
    """Mean absolute activation of every neuron (Alg. 2); no U-Net pass is needed.

    The mean runs over all padded positions: start, end and padding tokens included, as in the
    published statistics.

    Args:
        layers: dotted module name -> projection.
        prompt_embeds: text embeddings [batch, positions, width].

    Returns:
        Dotted module name -> activations [batch, out_features], float32 on the CPU, at least 0.
    """
    return {
        name: layer(prompt_embeds.to(layer.weight.dtype)).abs().float().mean(dim=1).cpu()
        for name, layer in layers.items()
    }


@dataclass(frozen=True)
class ActivationStatistics:
    """Mean and standard deviation of the activations over prompts that are not memorized.

    Attributes:
        mean: dotted module name -> [out_features], float32.
        std: dotted module name -> [out_features], float32, unbiased.
        num_prompts: how many prompts they were measured on.
    """

    mean: Mapping[str, Tensor]
    std: Mapping[str, Tensor]
    num_prompts: int

    def z_scores(self, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How far activations are from the usual, in standard deviations (Alg. 2).

        A neuron that never varied scores 0 if its activation is unchanged, and infinity otherwise.

        Args:
            activations: dotted module name -> [..., out_features].

        Raises:
            MaskError: the statistics have no such layer, or it has another size there.
        """
        scores = {}
        for name, values in activations.items():
            if name not in self.mean or self.mean[name].shape[-1] != values.shape[-1]:
                raise MaskError(f"The activation statistics do not fit layer `{name}`: recalibrate.")
            distance = values - self.mean[name]
            scores[name] = torch.where(distance == 0, 0.0, distance / self.std[name])
        return scores


class ActivationStatisticsFitter:
    """Streams activations of ordinary prompts into their mean and deviation (Welford, by batch)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def update(self, activations: Mapping[str, Tensor]) -> None:
        """Take in a batch: dotted module name -> [batch, out_features]."""
        batch = len(next(iter(activations.values())))
        total = self._count + batch
        for name, values in activations.items():
            values = values.double()
            mean = values.mean(0)
            squares = (values - mean).square().sum(0)
            if self._count:
                delta = mean - self._mean[name]
                squares += self._squares[name] + delta.square() * (self._count * batch / total)
                mean = self._mean[name] + delta * (batch / total)
            self._mean[name], self._squares[name] = mean, squares
        self._count = total

    @property
    def statistics(self) -> ActivationStatistics:
        """The statistics of everything seen so far; at least two prompts are needed."""
        divisor = max(self._count - 1, 1)
        return ActivationStatistics(
            mean={name: mean.float() for name, mean in self._mean.items()},
            std={name: (squares / divisor).sqrt().float() for name, squares in self._squares.items()},
            num_prompts=self._count,
        )
