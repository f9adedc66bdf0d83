"""Where two models differ: rows of the text projections and what is behind them, or something else."""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import BoolTensor, Tensor, nn

from nemo_prune.engine.layers import find_text_projections
from nemo_prune.errors import ModelError
from nemo_prune.mask import NeuronMask, bias_behind, weight_behind

# What rounding leaves of a difference between weights of the same precision, as a share of their norm.
_ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class ChangedRows:
    """What differs between two models.

    Attributes:
        mask: rows of text projections that differ; True where they do. Its shifts are what the biases behind the
            layers differ by; its combinations those that the weights behind read beside the rows.
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
    mask = _with_what_is_behind(NeuronMask(rows), base.unet, candidate.unet)
    searched = {f"{name}.{part}" for name in rows for part in ("weight", "bias")} | mask.behind
    return ChangedRows(
        mask,
        _differ(base.unet, candidate.unet, searched) or _differ(base.text_encoder, candidate.text_encoder, set()),
    )


def _rows_that_differ(a: nn.Linear, b: nn.Linear) -> torch.BoolTensor:
    differ = (a.weight != b.weight.to(a.weight)).any(dim=1).cpu()
    if a.bias is not None:
        differ |= (a.bias != b.bias.to(a.bias)).cpu()
    return differ


def _with_what_is_behind(mask: NeuronMask, a: nn.Module, b: nn.Module) -> NeuronMask:
    """The mask, with what biases and weights behind its layers differ by, where a mask can make that difference."""
    before, after = ({name: each.detach().cpu() for name, each in unet.named_parameters()} for unet in (a, b))
    shifts, combinations = {}, {}
    for layer, pruned in mask.layers.items():
        bias, weight = bias_behind(layer), weight_behind(layer)
        if not mask.num_neurons or weight not in before:
            continue
        if not torch.equal(before[weight], after[weight]):
            combination = _combination(before[weight], after[weight], pruned)
            if combination is not None:
                combinations[layer] = combination
        shift = after[bias].float() - before[bias].float() if bias in before else torch.zeros(0)
        if (pruned.any() or layer in combinations) and shift.any() and shift.isfinite().all():
            shifts[bias] = shift
    return NeuronMask(mask.layers, dict(sorted(shifts.items())), combinations)


def _combination(before: Tensor, after: Tensor, pruned: BoolTensor) -> Tensor | None:
    """What a weight reads from kept neurons beside them; None where it differs by something else."""
    exact, difference = before.double(), after.double() - before.double()
    if not difference.isfinite().all() or difference[:, pruned].any():
        return None
    combination = torch.linalg.lstsq(exact, difference).solution.float()
    combination[:, pruned] = 0
    left = (difference - exact @ combination.double()).norm()
    return combination if left <= _ROUNDING[after.dtype] * after.double().norm() else None


def _differ(a: nn.Module, b: nn.Module, without: set[str]) -> bool:
    others = b.state_dict()
    return any(
        name not in others or not torch.equal(value, others[name].to(value))
        for name, value in a.state_dict().items()
        if name not in without
    )
