"""Which neurons are pruned: a boolean mask per layer, saved as a small safetensors file."""

import json
import math
import re
from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import BoolTensor, Tensor

from nemo_prune.errors import MaskError, ModelError, SettingsError
from nemo_prune.facts import Digests, MaskFacts
from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.files.mask_tensors import FORMAT_VERSIONS, METADATA_KEY, layers_in_order, read_mask_tensors
from nemo_prune.files.staging import staged_file

# Bits of weights that are combined; float32 has 24 of each weight.
_WEIGHT_BITS = 26
# What a mask file calls the combinations of a layer.
_COMBINATION = ".combination"
_LAYER_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


class Neuron(NamedTuple):
    """One output feature of a text projection: a row of its weight matrix.

    Attributes:
        layer: dotted module name, such as ``mid_block.attentions.0.transformer_blocks.0.attn2.to_v``.
        index: row number, from 0.
    """

    layer: str
    index: int


def tensor_names(layer: str) -> tuple[str, str]:
    """The names of a projection's stored tensors: its weight matrix, and its bias, which not every one has."""
    return f"{layer}.weight", f"{layer}.bias"


def bias_behind(layer: str) -> str:
    """The name of the stored bias that is added behind a value projection, to the output of its attention."""
    return f"{layer.removesuffix('to_v')}to_out.0.bias"


def weight_behind(layer: str) -> str:
    """The name of the stored weight matrix of the projection behind a value projection's attention."""
    return f"{layer.removesuffix('to_v')}to_out.0.weight"


@dataclass(frozen=True)
class NeuronMask:
    """The neurons to prune, per layer. **True = pruned.**

    Attributes:
        layers: dotted module name -> bool tensor [out_features]. Every layer that was searched is
            there, even if nothing in it is pruned.
        shifts: name of a stored bias -> what is added to it, float32 [channels]: what its attention is given by pruned
            neurons that keep their mean, see :mod:`nemo_prune.engine.compensation`. Empty where they are 0.
        combinations: dotted module name -> the combination of a layer's kept neurons that is added to each neuron,
            float32 [out_features, out_features], 0 from pruned ones. The weight behind the attention W becomes W + W C.
            Empty where nothing is added. A layer may have one and no pruned neuron.
        withheld: name of a stored bias or weight behind the attention -> ``DTYPE:sha256`` of what pruning leaves of it,
            where the mask says no more: a release's mask, see :meth:`published`.

    Raises:
        MaskError: a layer's tensor is not a one-dimensional bool tensor, its name is not that of a module, or a shift,
            a combination or a digest belongs to no layer that is changed.
    """

    layers: Mapping[str, BoolTensor]
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    combinations: Mapping[str, Tensor] = field(default_factory=dict)
    withheld: Digests = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, pruned in self.layers.items():
            if not _LAYER_NAME.fullmatch(name):
                raise MaskError(f"Mask layer {name!r} is not a dotted module name, such as `mid_block.attn2.to_v`.")
            if pruned.dtype != torch.bool or pruned.ndim != 1:
                raise MaskError(
                    f"Mask layer `{name}` is {pruned.dtype} of shape {list(pruned.shape)}, expected "
                    "torch.bool of shape [out_features], where True means pruned."
                )
        biases = {
            bias_behind(layer) for layer, pruned in self.layers.items() if pruned.any() or layer in self.combinations
        }
        for name, shift in self.shifts.items():
            if name not in biases or shift.dtype != torch.float32 or shift.ndim != 1 or not shift.isfinite().all():
                raise MaskError(
                    f"The mask's shift of `{name}` is not one of a bias behind a layer that it changes, in finite "
                    "float32."
                )
        for name, combination in self.combinations.items():
            pruned = self.layers.get(name, torch.zeros(0, dtype=torch.bool))
            fits = combination.dtype == torch.float32 and combination.shape == (len(pruned), len(pruned))
            if not len(pruned) or not fits or not combination.isfinite().all() or combination[:, pruned].any():
                raise MaskError(
                    f"The mask's combinations of `{name}` are not those of its kept neurons, one for each neuron, in "
                    "finite float32."
                )
        elsewhere = self.withheld.keys() - self._behind_layers.keys()
        if elsewhere or (self.withheld and (self.shifts or self.combinations)):
            raise MaskError("The mask has digests of tensors that are behind none of its layers, or that it tells.")

    @classmethod
    def from_neurons(cls, neurons: Iterable[Neuron], sizes: Mapping[str, int]) -> "NeuronMask":
        """The mask of some neurons.

        Args:
            neurons: what to prune; a neuron named twice counts once.
            sizes: dotted module name -> number of neurons, for every layer of the mask.

        Raises:
            MaskError: a neuron's layer is not in ``sizes``, or its index is too large.
        """
        layers = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
        for neuron in neurons:
            size = sizes.get(neuron.layer, 0)
            if not 0 <= neuron.index < size:
                raise MaskError(
                    f"Neuron {neuron.index} of `{neuron.layer}` does not exist: the model has {size} "
                    "neurons there. Were the neurons found in another model?"
                )
            layers[neuron.layer][neuron.index] = True
        return cls(layers)

    @property
    def neurons(self) -> tuple[Neuron, ...]:
        """The pruned neurons, layer by layer, by index."""
        return tuple(
            Neuron(name, index) for name, pruned in self.layers.items() for index in pruned.nonzero().flatten().tolist()
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of pruned neurons per layer, zeros included."""
        return {name: int(pruned.sum()) for name, pruned in self.layers.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of neurons per layer, pruned or not."""
        return {name: len(pruned) for name, pruned in self.layers.items()}

    @property
    def num_neurons(self) -> int:
        """Number of pruned neurons."""
        return sum(self.counts.values())

    @property
    def tensor_rows(self) -> dict[str, list[int]]:
        """Name of a stored tensor -> its pruned rows, for weights and biases of layers that have any."""
        return {
            tensor: pruned.nonzero().flatten().tolist()
            for layer, pruned in self.layers.items()
            for tensor in tensor_names(layer)
            if pruned.any()
        }

    @property
    def touched(self) -> KeysView[str]:
        """Names of the stored tensors that pruning changes: those with pruned rows, then those behind."""
        return {**self.tensor_rows, **self._layers_before}.keys()

    @property
    def behind(self) -> KeysView[str]:
        """Names of the stored tensors behind the attention that are changed: shifted biases, and weights."""
        return self._layers_before.keys()

    @property
    def _layers_before(self) -> dict[str, str]:
        """Name of a stored tensor behind the attention that is changed -> the layer before it."""
        changed = self.shifts.keys() | self.withheld.keys() | {weight_behind(layer) for layer in self.combinations}
        return {name: layer for name, layer in self._behind_layers.items() if name in changed}

    @property
    def _behind_layers(self) -> dict[str, str]:
        """Name of every stored tensor behind the attention, changed or not -> the layer before it."""
        return {name: layer for layer in self.layers for name in (bias_behind(layer), weight_behind(layer))}

    def fits_behind(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor behind the attention has a shape that can be changed as the mask says."""
        if name in self.shifts:
            return tuple(shape) == tuple(self.shifts[name].shape)
        if name == bias_behind(self._layers_before[name]):
            return len(shape) == 1
        return len(shape) == 2 and shape[1] == len(self.layers[self._layers_before[name]])

    def changed_behind(self, name: str, values: Tensor) -> Tensor:
        """A tensor behind the attention as pruning leaves it, in its own dtype.

        Files and models agree to the last bit on every machine: sums are taken in float64 on the CPU, of products that
        are exact there.

        Args:
            name: of a bias or weight, one of :attr:`behind`.
            values: the base's.

        Raises:
            MaskError: the mask does not say how.
        """
        self.check_complete()
        exact = values.detach().cpu().double()
        if name in self.shifts:
            changed = exact + self.shifts[name].double()
        else:
            changed = exact + _exact_product(exact, self.combinations[self._layers_before[name]].double())
        return changed.to(values.dtype).to(values.device)

    def extended(self, neurons: Iterable[Neuron]) -> "NeuronMask":
        """The mask with further neurons, which give nothing; what it changes behind the attention stays."""
        self.check_complete()
        wider = NeuronMask.from_neurons([*self.neurons, *neurons], self.sizes)
        combinations = {layer: each.masked_fill(wider.layers[layer], 0.0) for layer, each in self.combinations.items()}
        return replace(wider, shifts=self.shifts, combinations=combinations)

    def published(self, digests: Digests) -> "NeuronMask":
        """The mask without what undoes a part of the pruning: what its combinations change is told by digests alone.

        Who knows the combinations can take them back without the base, because they have an inverse.

        Args:
            digests: tensor -> digests of what pruning leaves of it, for all that is changed behind the attention.
        """
        if not self.combinations:
            return self
        return NeuronMask(self.layers, withheld={name: digests[name] for name in self.behind})

    def check_complete(self) -> None:
        """Refuse a mask that does not say all that it changes.

        Raises:
            MaskError: it is a release's, which withholds a part.
        """
        if self.withheld:
            raise MaskError(
                "This mask withholds how it changes the weights behind the attention, as the mask in a release does, "
                "because that could be undone. Use the mask.safetensors in the work folder of the run that made it."
            )

    @property
    def digest(self) -> str:
        """sha256 over the layers' names and bits, the shifts, the combinations and the digests."""
        rows: list = [(name, pruned.tolist()) for name, pruned in self.layers.items()]
        rows += [(name, self.shifts[name].tolist()) for name in sorted(self.shifts)]
        rows += [(name, _bytes_digest(self.combinations[name])) for name in sorted(self.combinations)]
        rows += [(name, sorted(self.withheld[name])) for name in sorted(self.withheld)]
        return sha256(json.dumps(rows).encode()).hexdigest()

    def check(self, sizes: Mapping[str, int]) -> None:
        """Refuse a model that the mask was not made for.

        Args:
            sizes: dotted module name -> number of neurons of the model.

        Raises:
            MaskError: a layer is missing in the model or has another size there.
        """
        for name, pruned in self.layers.items():
            if name not in sizes:
                known = "\n  ".join(sizes) or "none"
                raise MaskError(f"Mask layer `{name}` is not in the model. Its layers are:\n  {known}")
            if len(pruned) != sizes[name]:
                raise MaskError(
                    f"Mask layer `{name}` has {len(pruned)} neurons, the model's has {sizes[name]}. "
                    "Was the mask made for another model?"
                )

    def save(self, path: Path, facts: MaskFacts = MaskFacts()) -> None:
        """Write the mask to a small safetensors file.

        Args:
            path: the file; an existing one is replaced.
            facts: what the file says beside the rows, such as base model and settings.

        Raises:
            OutputError: the file can't be written.
        """
        # One metadata key keeps the file the same byte for byte: the writer does not sort the keys.
        described = {
            **facts.to_json(),
            "format_version": FORMAT_VERSIONS[2 if self.combinations or self.withheld else bool(self.shifts)],
            "true_means": "pruned",
            "layers": list(self.layers),
            **({"withheld": to_json(self.withheld)} if self.withheld else {}),
            "digest": self.digest,
        }
        encoded = json.dumps(described, sort_keys=True)
        with staged_file(path) as partial:
            combinations = {f"{name}{_COMBINATION}": each for name, each in self.combinations.items()}
            tensors = {**self.layers, **self.shifts, **combinations}
            partial.write_bytes(save(tensors, metadata={METADATA_KEY: encoded}))

    @classmethod
    def load(cls, path: Path) -> "NeuronMask":
        """Read a mask that :meth:`save` wrote.

        Raises:
            MaskError: the file is missing or not a mask of this format.
        """
        return cls.load_with_facts(path)[0]

    @classmethod
    def load_with_facts(cls, path: Path) -> tuple["NeuronMask", MaskFacts]:
        """Read a mask and what its file says beside it. Raises as :meth:`load`."""
        path = Path(path)
        if not path.is_file():
            raise MaskError(f"There is no mask at {path}.")
        try:
            metadata, tensors = read_mask_tensors(path)
            withheld = from_json(Digests, metadata.pop("withheld", {}))
            facts = MaskFacts.from_json(metadata)
            layers = layers_in_order(metadata, [name for name, each in tensors.items() if each.dtype == torch.bool])
            behind = {name: each for name, each in tensors.items() if each.dtype != torch.bool}
            mask = cls(
                {name: tensors[name] for name in layers},
                {name: each for name, each in behind.items() if not name.endswith(_COMBINATION)},
                {name.removesuffix(_COMBINATION): each for name, each in behind.items() if name.endswith(_COMBINATION)},
                withheld,
            )
        except (ModelError, SafetensorError, ValueError, OSError) as error:
            raise MaskError(f"{path} is not a mask of nemo-prune, or it was damaged: {error}") from error
        if metadata.get("digest", mask.digest) != mask.digest:
            raise MaskError(f"{path} was damaged: its rows are not those that were saved. Fetch it again.")
        return mask, facts


@dataclass(frozen=True)
class Pruning:
    """What is done to a model: the rows of a mask are multiplied by a number, and what is behind them is changed.

    Attributes:
        mask: the neurons, and what is changed behind the attention.
        scale: what their rows, or their outputs in a live model, are multiplied by; 0 zeroes them.

    Raises:
        SettingsError: scaled rows have a mean of their own, so that nothing must stand in for it.
        MaskError: the mask withholds what it changes.
    """

    mask: NeuronMask
    scale: float = 0.0

    def __post_init__(self) -> None:
        self.mask.check_complete()
        if self.scale and self.mask.behind:
            raise SettingsError(
                f"The mask makes up for rows that are zeroed: --scale {self.scale} does not go with it. Leave --scale "
                "out, or search again with --ablation zero."
            )


def _exact_product(weights: Tensor, combination: Tensor) -> Tensor:
    """A product of matrices, float64, whose sums are exact in whatever order a machine takes them.

    Both are rounded to multiples of a power of 2: weights to 26 bits below their largest, which is finer than float32,
    combinations to as many bits as are left of the 53 of a float64, 16 for 2,048 neurons.

    Args:
        weights: [channels, neurons].
        combination: [neurons, neurons].
    """
    left = 53 - _WEIGHT_BITS - math.ceil(math.log2(max(2, weights.shape[1])))
    return _rounded(weights, _WEIGHT_BITS) @ _rounded(combination, left)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Values as multiples of a power of 2, so many bits below the largest."""
    largest = float(values.abs().max())
    step = 2.0 ** (math.frexp(largest)[1] - bits)
    return (values / step).round() * step


def _bytes_digest(tensor: Tensor) -> str:
    return sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
