"""Which neurons are pruned: a boolean mask per layer, saved as a small safetensors file."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import BoolTensor

from nemo_prune.errors import MaskError

FORMAT_VERSION = 1
METADATA_KEY = "nemo_prune"


class Neuron(NamedTuple):
    """One output feature of a text projection: a row of its weight matrix.

    Attributes:
        layer: dotted module name, such as ``mid_block.attentions.0.transformer_blocks.0.attn2.to_v``.
        index: row number, from 0.
    """

    layer: str
    index: int


@dataclass(frozen=True)
class NeuronMask:
    """The neurons to prune, per layer. **True = pruned.**

    Attributes:
        layers: dotted module name -> bool tensor [out_features]. Every layer that was searched is
            there, also those in which nothing is pruned.

    Raises:
        MaskError: a layer's tensor is not a one-dimensional bool tensor.
    """

    layers: Mapping[str, BoolTensor]

    def __post_init__(self) -> None:
        for name, pruned in self.layers.items():
            if pruned.dtype != torch.bool or pruned.ndim != 1:
                raise MaskError(
                    f"Mask layer `{name}` is {pruned.dtype} of shape {list(pruned.shape)}, expected "
                    "torch.bool of shape [out_features], where True means pruned."
                )

    @classmethod
    def from_neurons(cls, neurons: Iterable[Neuron], sizes: Mapping[str, int]) -> "NeuronMask":
        """The mask of some neurons.

        Args:
            neurons: what to prune; a neuron named twice counts once.
            sizes: dotted module name -> number of neurons, for every layer of the mask.

        Raises:
            MaskError: a neuron lies in no layer of ``sizes`` or past its end.
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
        """Number of pruned neurons per layer, also where it is 0."""
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
            f"{name}.{part}": pruned.nonzero().flatten().tolist()
            for name, pruned in self.layers.items()
            for part in ("weight", "bias")
            if pruned.any()
        }

    @property
    def digest(self) -> str:
        """sha256 over the layers' names and bits."""
        rows = [(name, pruned.tolist()) for name, pruned in self.layers.items()]
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

    def save(self, path: Path, metadata: Mapping[str, object] | None = None) -> None:
        """Write the mask to a safetensors file of a few kilobytes.

        Args:
            path: the file; an existing one is replaced.
            metadata: JSON values to keep beside the mask, such as base model and settings.
        """
        # One metadata key keeps the file the same byte for byte: the writer does not sort the keys.
        described = {
            "format_version": FORMAT_VERSION,
            "true_means": "pruned",
            "layers": list(self.layers),
            **(metadata or {}),
        }
        encoded = json.dumps(described, sort_keys=True)
        save_file(dict(self.layers), path, metadata={METADATA_KEY: encoded})

    @classmethod
    def load(cls, path: Path) -> "NeuronMask":
        """Read a mask that :meth:`save` wrote.

        Raises:
            MaskError: the file is missing or is no mask of this format.
        """
        return cls.load_with_metadata(path)[0]

    @classmethod
    def load_with_metadata(cls, path: Path) -> tuple["NeuronMask", dict]:
        """Read a mask and what was saved beside it. Raises as :meth:`load`."""
        if not Path(path).is_file():
            raise MaskError(f"There is no mask at {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                # The header lists the layers by name; the order of execution was saved beside them.
                names = metadata.get("layers") or sorted(file.keys())
                layers = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, json.JSONDecodeError) as error:
            raise MaskError(f"{path} is no mask of nemo-prune: {error}") from error
        if metadata.get("format_version") != FORMAT_VERSION:
            raise MaskError(
                f"{path} has mask format {metadata.get('format_version')}, this version reads "
                f"{FORMAT_VERSION}. Is it a mask, and made by a newer nemo-prune?"
            )
        return cls(layers), metadata
