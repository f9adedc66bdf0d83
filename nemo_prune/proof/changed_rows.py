"""Where two models differ: rows of the text projections and the biases behind them, or something else."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from nemo_prune.engine.layers import find_text_projections
from nemo_prune.errors import ModelError
from nemo_prune.mask import NeuronMask, bias_behind


@dataclass(frozen=True)
class ChangedRows:
    """What differs between two models.

    Attributes:
        mask: rows of text projections that differ; True where they do. Its shifts are what the biases behind these
            layers differ by.
        others: whether any other weight of U-Net or text encoder differs.
    """

    mask: NeuronMask
    others: bool

    @property
    def are_a_mask(self) -> bool:
        """Whether the candidate is the base pruned by a mask and nothing else."""
        return self.mask.num_neurons > 0 and not self.others


def changed_rows(base: StableDiffusionPipeline, candidate: StableDiffusionPipeline) -> ChangedRows:
    """Compare two models weight by weight.

    Raises:
        ModelError: their architectures differ, so that they can't be judged by the same seeds.
    """
    ours, theirs = (find_text_projections(pipe.unet, "both") for pipe in (base, candidate))
    shapes = [
        {name: tuple(value.shape) for name, value in pipe.unet.state_dict().items()} for pipe in (base, candidate)
    ]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
        raise ModelError(
            f"Base and candidate have different U-Nets ({differing[0]} and {len(differing) - 1} more). Only models of "
            "one architecture can be compared on the same seeds."
        )
    rows = {name: _rows_that_differ(layer, theirs[name]) for name, layer in ours.items()}
    behind = {bias_behind(name) for name, differ in rows.items() if differ.any()}
    shifts = _shifts(base.unet, candidate.unet, behind)
    searched = {f"{name}.{part}" for name in rows for part in ("weight", "bias")} | shifts.keys()
    return ChangedRows(
        NeuronMask(rows, shifts),
        _differ(base.unet, candidate.unet, searched) or _differ(base.text_encoder, candidate.text_encoder, set()),
    )


def _rows_that_differ(a: nn.Linear, b: nn.Linear) -> torch.BoolTensor:
    differ = (a.weight != b.weight.to(a.weight)).any(dim=1).cpu()
    if a.bias is not None:
        differ |= (a.bias != b.bias.to(a.bias)).cpu()
    return differ


def _shifts(a: nn.Module, b: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """What biases differ by, for those that do; a model without such a bias has no shift."""
    before, after = dict(a.named_parameters()), dict(b.named_parameters())
    shifts = {name: (after[name].cpu().float() - before[name].cpu().float()).detach() for name in names & before.keys()}
    return {name: shift for name, shift in sorted(shifts.items()) if shift.any() and shift.isfinite().all()}


def _differ(a: nn.Module, b: nn.Module, without: set[str]) -> bool:
    others = b.state_dict()
    return any(
        name not in others or not torch.equal(value, others[name].to(value))
        for name, value in a.state_dict().items()
        if name not in without
    )
