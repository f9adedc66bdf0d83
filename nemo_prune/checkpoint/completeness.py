"""Whether a part's weights are all there: a loader fills what is missing with random values, and says nothing."""

import re
from collections.abc import Iterable, Mapping

from nemo_prune.checkpoint.architecture import expected_shapes
from nemo_prune.checkpoint.folder import CheckpointFiles, component_names
from nemo_prune.checkpoint.parts import WEIGHT_STEMS
from nemo_prune.checkpoint.weights import WeightsFile, loaded_weights, refuse_missing_shards, weights_files
from nemo_prune.errors import ModelError
from nemo_prune.files.safetensors_header import FLOAT_DTYPES, read_header

# Old files have it, new ones compute it.
_COMPUTED = ".position_ids"
# As diffusers named the VAE's attention before 0.17; Stable Diffusion v1-4 is published so.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"\.({'|'.join(_OLD_NAMES)})\.(weight|bias)$")
# A transformers version may repeat them or leave them out.
_WRAPPERS = re.compile(r"\b(text_model|vision_model)\.")
_CAUSES = (
    (("lora_", "base_layer"), "An adapter (LoRA) is not merged into the weights: `pipe.fuse_lora()`, then "
     "`pipe.unload_lora_weights()`, and save the model."),
    (("_orig_mod.",), "It was saved from a compiled model: save `model._orig_mod` instead."),
    (("module.",), "It was saved from a wrapped model (DataParallel): save `model.module` instead."),
    (("weight_scale", "absmax", "quant_", "scale_weight"), "The weights are quantised: use the float32, float16 or "
     "bfloat16 weights."),
)  # fmt: skip


def check_complete(files: CheckpointFiles, variant: str | None) -> None:
    """Compare the stored names and shapes of every part with what its config builds.

    Args:
        files: of the model.
        variant: of the weights.

    Raises:
        ModelError: a tensor is missing, unexpected, of another shape, or in a format that can't be pruned.
    """
    for component in component_names(files.folder):
        if component in WEIGHT_STEMS:
            chosen = _chosen(files, component, variant)
            tensors = {}
            for each in chosen:
                tensors |= {
                    name: (stored.shape, stored.dtype) for name, stored in read_header(files.folder / each.path).items()
                }
            _check_dtypes(component, {name: dtype for name, (_, dtype) in tensors.items()})
            shapes = {name: shape for name, (shape, _) in tensors.items()}
            check_shapes(component, shapes, expected_shapes(files.folder, component))


def check_shapes(
    component: str, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors of a part with those that it must have.

    Args:
        component: name of the part, for the message.
        stored: name -> shape.
        expected: the same, by its config.

    Raises:
        ModelError: they are not the same.
    """
    there, wanted = _normalized(stored), _normalized(expected)
    missing = [name for name in wanted if name not in there]
    unexpected = [name for name in there if name not in wanted]
    other = [name for name in wanted if name in there and _without_ones(there[name]) != _without_ones(wanted[name])]
    cause = _cause(unexpected)
    if missing:
        raise ModelError(
            f"The weights of the {component} lack {len(missing)} of the {len(wanted)} tensors that its config "
            f"describes, the first is `{missing[0]}`. {cause or 'Fetch the model anew.'}"
        )
    if unexpected:
        raise ModelError(
            f"The weights of the {component} hold {len(unexpected)} tensors that its config does not describe, the "
            f"first is `{unexpected[0]}`. {cause or 'Is the config of another model? Fetch the model anew.'}"
        )
    if other:
        name = other[0]
        raise ModelError(
            f"{len(other)} tensors of the {component} have another shape than its config describes, the first is "
            f"`{name}`: {list(there[name])}, expected {list(wanted[name])}. Is the config of another model? Fetch the "
            "model anew."
        )


def _chosen(files: CheckpointFiles, component: str, variant: str | None) -> list[WeightsFile]:
    """The files that a loader takes; none is missing."""
    there = weights_files(files, component)
    chosen = loaded_weights(there, variant)
    variants = sorted({each.variant for each in there if each.variant})
    if not chosen:
        hint = f" Its weights are there as {', '.join(variants)}: give --variant {variants[0]}." if variants else ""
        raise ModelError(
            f"The {component} of the model has no weights that stock loaders take.{hint or ' Fetch the model anew.'}"
        )
    if variant and component == "unet" and chosen[0].variant != variant:
        known = f"The variants are {', '.join(variants)}." if variants else "There are only the plain weights."
        raise ModelError(f"The model has no variant `{variant}` of the U-Net. {known} Correct or leave out --variant.")
    refuse_missing_shards(component, chosen)
    return chosen


def _check_dtypes(component: str, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in FLOAT_DTYPES and not name.endswith(_COMPUTED):
            raise ModelError(
                f"`{name}` of the {component} is stored as {dtype}. Rows of quantised weights can't be zeroed exactly: "
                "use the float32, float16 or bfloat16 weights."
            )


def _normalized(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same under names that do not depend on the version that saved them."""
    return {
        _OLD_NAME.sub(lambda match: f".{_OLD_NAMES[match[1]]}.{match[2]}", _WRAPPERS.sub("", name)): shape
        for name, shape in shapes.items()
        if not name.endswith(_COMPUTED)
    }


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a matrix are the same bytes."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _cause(unexpected: Iterable[str]) -> str | None:
    names = list(unexpected)
    for marks, cause in _CAUSES:
        if any(mark in name for name in names for mark in marks):
            return cause
    return None
