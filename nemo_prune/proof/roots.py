"""Roots beneath the cut (arXiv 2603.06640): where rows were cut shows in the weights, and they can be filled again."""

from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from nemo_prune.engine.layers import find_text_projections
from nemo_prune.mask import NeuronMask

Filling = Literal["random rows of the same spread", "copies of other rows", "mixtures of other rows", "stretched"]
FILLINGS: tuple[Filling, ...] = ("random rows of the same spread", "copies of other rows", "mixtures of other rows")
STRETCHED: Filling = "stretched"
# A row whose norm is this many deviations below the others', and this small beside their median, stands out.
_OUTSTANDING = 6.0
_SMALL = 0.5


@dataclass(frozen=True)
class FoundRows:
    """Rows that stand out in the candidate's weights alone.

    Attributes:
        zeroed: rows that are zero throughout.
        small: rows that are not, but whose norm stands out below the others of their matrix.
        changed: rows that differ from the base's; None where more than rows differ.
        found: how many of the changed rows are among the zeroed and small ones; None where more than rows differ.
        in_base: rows of the base that are zero or stand out: what looking finds where nothing was cut.
    """

    zeroed: int
    small: int
    changed: int | None
    found: int | None
    in_base: int


def rows_that_stand_out(unet: UNet2DConditionModel) -> tuple[NeuronMask, NeuronMask]:
    """Rows of the text projections that are zero, and those that are oddly small; nothing but the weights is used.

    The logarithm of a row's norm is compared with its matrix's median, in median absolute deviations.
    """
    zeroed, small = {}, {}
    for name, layer in find_text_projections(unet, "both").items():
        norms = layer.weight.detach().float().norm(dim=1).cpu()
        zeroed[name] = norms == 0
        logs = norms.clamp_min(1e-30).log()
        middle = logs[~zeroed[name]].median() if (~zeroed[name]).any() else logs.median()
        deviation = (logs - middle)[~zeroed[name]].abs().median() * 1.4826
        least = middle - max(_OUTSTANDING * float(deviation), -log(_SMALL))
        small[name] = ~zeroed[name] & (logs < least)
    return NeuronMask(zeroed), NeuronMask(small)


@torch.no_grad()
def fill_rows(unet: UNet2DConditionModel, rows: NeuronMask, filling: Filling, seed: int) -> None:
    """Fill rows again from the rest of their matrix and from nothing else.

    Args:
        unet: is changed.
        rows: what to fill; True = fill.
        filling: random rows with the mean and covariance of the others; copies of random others; random
            mixtures of the others, stretched to their norm; or, for rows that are small but not zero, the row itself
            stretched to the median norm of the others, its sign turned.
        seed: of what is random.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in find_text_projections(unet, "both").items():
        chosen = rows.layers[name].nonzero().flatten()
        others = layer.weight[~rows.layers[name].to(layer.weight.device)].float().cpu()
        if len(chosen) and len(others):
            filled = _filled(layer.weight[chosen].float().cpu(), others, filling, generator)
            layer.weight[chosen] = filled.to(layer.weight)


def found_rows(candidate: UNet2DConditionModel, base: UNet2DConditionModel, changed: NeuronMask | None) -> FoundRows:
    """How well looking finds what was changed.

    Args:
        candidate: is looked at.
        base: is looked at as a control.
        changed: rows that differ from the base's; None where more than rows differ.
    """
    zeroed, small = rows_that_stand_out(candidate)
    seen = set(zeroed.neurons) | set(small.neurons)
    return FoundRows(
        zeroed.num_neurons,
        small.num_neurons,
        None if changed is None else changed.num_neurons,
        None if changed is None else len(seen & set(changed.neurons)),
        sum(mask.num_neurons for mask in rows_that_stand_out(base)),
    )


def _filled(rows: Tensor, others: Tensor, filling: Filling, generator: torch.Generator) -> Tensor:
    number, norm = len(rows), others.norm(dim=1).median()
    if filling == STRETCHED:
        return -rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) * norm
    if filling == "copies of other rows":
        return others[torch.randint(len(others), (number,), generator=generator)]
    if filling == "mixtures of other rows":
        weights = torch.randn((number, len(others)), generator=generator).softmax(dim=1)
        mixed = weights @ others
        return mixed / mixed.norm(dim=1, keepdim=True).clamp_min(1e-12) * norm
    # Products with random weights have the others' mean and covariance.
    centred = others - others.mean(dim=0)
    weights = torch.randn((number, len(others)), generator=generator) / len(others) ** 0.5
    return others.mean(dim=0) + weights @ centred
