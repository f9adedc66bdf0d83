"""The names that a tensor has in a diffusers folder and in a single-file checkpoint of SD 1.x.

Single files (A1111, ComfyUI, Forge) keep the names of the original code, latent diffusion (LDM). Each tensor has
one name there and one in diffusers, and the same bytes: only the shape of the VAE's attention weights differs, which
are stored as 1x1 convolutions.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable

from nemo_prune.errors import ModelError

# Component of a diffusers pipeline -> prefix of its names in a single file.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
EMA_PREFIX = "model_ema."
# Some programs write the text encoder without its `text_model.`.
_SHORT_TEXT_PREFIX = "cond_stage_model.transformer."

_SHOWN_NAMES = 5

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
_VAE_SAME = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # The names in diffusers before 0.17; Stable Diffusion v1-4 is published with them.
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def ldm_names(component: str, names: Iterable[str]) -> dict[str, str]:
    """The single-file names of a component's tensors.

    Args:
        component: ``unet``, ``vae`` or ``text_encoder``.
        names: all of its tensors, as any version of diffusers stored them; they show the number and the
            length of the blocks.

    Returns:
        Name in the folder -> name in a single file.

    Raises:
        ModelError: a tensor has no place in a single file of SD 1.x, or that of another.
    """
    names = list(names)
    if component == "unet":
        length = _common_length(names)
        with_attention = {int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d{1,4})\.att", name))}
        found = {name: _unet_name(name, length, with_attention) for name in names}
    elif component == "vae":
        num_blocks = _count(r"decoder\.up_blocks\.(\d{1,4})\.", names)
        found = {name: _vae_name(name, num_blocks) for name in names}
    else:
        found = {name: name.removeprefix("text_model.") for name in names}
    taken: set[str] = set()
    for name, renamed in found.items():
        if renamed is None or renamed in taken:
            raise ModelError(
                f"`{name}` of the {component} has no place of its own in a single file of Stable Diffusion 1.x. Give a "
                "folder as --out."
            )
        taken.add(renamed)
    return {name: PREFIXES[component] + renamed for name, renamed in found.items()}


def ldm_shape(ldm_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in a single file: the VAE's attention is 1x1 convolutions there."""
    is_convolution = ldm_name.startswith(PREFIXES["vae"]) and ".attn_1." in ldm_name and len(shape) == 2
    return (*shape, 1, 1) if is_convolution else shape


def layer_names(names: Iterable[str], file_names: Iterable[str]) -> dict[str, str]:
    """The single-file names of tensors of the U-Net's attention, found without its config.

    Args:
        names: tensors in a diffusers folder; those of other parts are left out.
        file_names: all names of the single file; its first downsampler shows how long a block is.
    """
    downsampler = re.compile(re.escape(PREFIXES["unet"]) + r"input_blocks\.(\d{1,4})\.0\.op\.")
    length = min((int(match[1]) for name in file_names if (match := downsampler.match(name))), default=0)
    found = {name: _unet_name(name, length) for name in names if ".attentions." in name}
    return {name: PREFIXES["unet"] + renamed for name, renamed in found.items() if renamed}


def ema_name(ldm_name: str) -> str:
    """The name of the moving average of a U-Net tensor: the original code drops the dots."""
    return EMA_PREFIX + ldm_name.removeprefix("model.").replace(".", "")


def full_name(file_name: str) -> str:
    """The name that a tensor of a file usually has: some programs leave out the text encoder's ``text_model.``."""
    if file_name.startswith(_SHORT_TEXT_PREFIX):
        return PREFIXES["text_encoder"] + file_name.removeprefix(_SHORT_TEXT_PREFIX).removeprefix("text_model.")
    return file_name


def refuse_other_families(file_names: Iterable[str]) -> None:
    """Refuse a single file that is not a whole checkpoint of SD 1.x.

    Raises:
        ModelError: it is of another family, or holds a part of a model.
    """
    file_names = list(file_names)
    for family, start in (("Stable Diffusion 2.x", "cond_stage_model.model."), ("SDXL", "conditioner.")):
        if any(name.startswith(start) for name in file_names):
            raise ModelError(f"The single file is of {family}; supported are single files of Stable Diffusion 1.x.")
    begins = {name.partition(".")[0] for name in file_names}
    parts = {"U-Net": "model", "VAE": "first_stage_model", "text encoder": "cond_stage_model"}
    missing = [part for part, start in parts.items() if start not in begins]
    if missing:
        raise ModelError(
            f"The single file holds no {' and no '.join(missing)}; its names begin with "
            f"{', '.join(sorted(begins)[:_SHOWN_NAMES])}. Give a whole checkpoint of Stable Diffusion 1.x, as A1111 "
            "and ComfyUI take it, or a diffusers folder."
        )


def _common_length(names: Iterable[str]) -> int:
    """How many resnets an up block of a U-Net has: one more than a down block."""
    places = {
        match.groups() for name in names if (match := re.match(r"up_blocks\.(\d{1,4})\.resnets\.(\d{1,4})\.", name))
    }
    lengths = set(Counter(block for block, _ in places).values())
    if len(lengths) > 1:
        raise ModelError(
            f"The U-Net's blocks have different lengths ({', '.join(map(str, sorted(lengths)))} resnets in the up "
            "blocks); what reads single files expects one length. Give a folder as --out."
        )
    return next(iter(lengths), 0)


def _unet_name(name: str, length: int, with_attention: Collection[int] = ()) -> str | None:
    """Args: length: of an up block in resnets, which is that of a down block with its downsampler."""
    layer, _, part = name.rpartition(".")
    if layer in _UNET_ENDS:
        return f"{_UNET_ENDS[layer]}.{part}"
    if match := re.fullmatch(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)", name):
        return _inside(f"middle_block.{_UNET_MIDDLE[match[1]]}", match[1].partition(".")[0], match[2])
    if not (match := re.fullmatch(r"(down|up)_blocks\.(\d{1,4})\.(\w+)\.(\d{1,4})\.(.+)", name)):
        return None
    direction, block, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{length * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{length * (block + 1) - 1}.{2 if block in with_attention else 1}.{rest}"
    slot = length * block + place
    slots = f"input_blocks.{slot + 1}" if direction == "down" else f"output_blocks.{slot}"
    return _inside(f"{slots}.{1 if kind == 'attentions' else 0}", kind, rest)


def _inside(place: str, kind: str, rest: str) -> str | None:
    if kind == "attentions":
        return f"{place}.{rest}"
    layer, _, part = rest.partition(".")
    return f"{place}.{_UNET_RESNET[layer]}.{part}" if kind == "resnets" and layer in _UNET_RESNET else None


def _vae_name(name: str, num_blocks: int) -> str | None:
    half, _, rest = name.partition(".")
    if half in _VAE_SAME:
        return name
    layer, _, part = rest.rpartition(".")
    if layer in _VAE_SAME:
        return name
    if layer == "conv_norm_out":
        return f"{half}.norm_out.{part}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d{1,4})\.(.+)", layer):
        return f"{half}.mid.block_{int(match[1]) + 1}.{_shortcut(match[2])}.{part}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", layer):
        return f"{half}.mid.attn_1.{_VAE_ATTENTION[match[1]]}.{part}" if match[1] in _VAE_ATTENTION else None
    if not (match := re.fullmatch(r"(down|up)_blocks\.(\d{1,4})\.(resnets|\w+samplers)\.(\d{1,4})\.(.+)", layer)):
        return None
    direction, block, kind, place, layer = match[1], int(match[2]), match[3], match[4], match[5]
    # The original code counts the decoder's blocks from the image.
    block = block if direction == "down" else num_blocks - 1 - block
    if kind == "resnets":
        return f"{half}.{direction}.{block}.block.{place}.{_shortcut(layer)}.{part}"
    return f"{half}.{direction}.{block}.{direction}sample.{layer}.{part}"


def _shortcut(layer: str) -> str:
    return "nin_shortcut" if layer == "conv_shortcut" else layer


def _count(pattern: str, names: Iterable[str]) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})
