"""Which projections of a model see the text: found by what they do, named by their dotted path."""

from collections.abc import Iterable

import torch
from torch import nn

from nemo_prune.errors import ModelError
from nemo_prune.mask import weight_behind

# No image is 13 positions long at any resolution that a U-Net halves, so an input of 13 is text.
_PROBE_TEXT_LENGTH = 13
_SUFFIXES = {"value": (".to_v",), "key": (".to_k",), "both": (".to_k", ".to_v")}


def find_text_projections(unet: nn.Module, projections: str = "value") -> dict[str, nn.Linear]:
    """The projections through which text enters the down blocks and the mid block.

    One dry pass over tiny latents with a text of odd length shows which linear layers see the
    text. Up blocks are left out: their values hardly change replication (paper, App. C.8).

    Args:
        unet: a ``UNet2DConditionModel`` of SD 1.x's kind.
        projections: ``value``, ``key`` or ``both``.

    Returns:
        Dotted module name -> layer, in the order of execution: down blocks, then the mid block.

    Raises:
        ModelError: the projections are fused, wrapped by a LoRA or quantised, or none was found.
    """
    refuse_altered_projections(unet)
    suffixes = _SUFFIXES[projections]
    linears = {name: module for name, module in unet.named_modules() if name.endswith(suffixes)}
    found = [name for name in _names_that_see_text(unet, linears) if not name.startswith("up_blocks.")]
    if not found:
        listed = "\n  ".join(linears) or f"no layer whose name ends in {' or '.join(suffixes)}"
        raise ModelError(
            f"No text projection ({projections}) of the down and mid blocks sees the text. The model has:\n"
            f"  {listed}\nSupported are U-Nets of SD 1.x's kind, with cross-attention in these blocks."
        )
    return {name: linears[name] for name in found}


def refuse_altered_projections(unet: nn.Module) -> None:
    """Refuse a model whose stored rows are not what its projections compute.

    Raises:
        ModelError: fused projections, an attached LoRA or quantised weights, with the remedy.
    """
    if getattr(unet, "peft_config", None) or any(_is_adapter(m) for m in unet.modules()):
        raise ModelError(
            "A LoRA is attached to the U-Net. Fuse it into the weights and unload it first: "
            "`pipe.fuse_lora(); pipe.unload_lora_weights()`, then save that model and prune it."
        )
    if any(_is_fused(module) for module in unet.modules()):
        raise ModelError(
            "The U-Net's attention projections are fused, so its value rows are not used. "
            "Undo it first: `pipe.unet.unfuse_qkv_projections()`."
        )
    quantised = getattr(unet, "hf_quantizer", None) is not None or any(
        not parameter.is_floating_point() for parameter in unet.parameters()
    )
    if quantised or any(_is_quantised(module) for module in unet.modules()):
        raise ModelError(
            "The U-Net's weights are quantised, and rows of quantised weights can't be zeroed "
            "exactly. Load the model in float32, float16 or bfloat16."
        )


def layer_sizes(layers: dict[str, nn.Linear]) -> dict[str, int]:
    """Dotted module name -> number of neurons."""
    return {name: layer.out_features for name, layer in layers.items()}


def projection_behind(unet: nn.Module, layer: str) -> nn.Linear:
    """The projection behind the attention of a value projection, which is given by its dotted module name."""
    return unet.get_submodule(weight_behind(layer).removesuffix(".weight"))


def _is_fused(module: nn.Module) -> bool:
    # The mark `fused_projections` stays when diffusers unfuses; the processor tells what computes.
    return type(getattr(module, "processor", None)).__name__.startswith("Fused")


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _is_quantised(module: nn.Module) -> bool:
    return ".quantized" in type(module).__module__ or type(module).__module__.startswith("bitsandbytes")


@torch.no_grad()
def _names_that_see_text(unet: nn.Module, linears: dict[str, nn.Module]) -> Iterable[str]:
    seen: dict[str, None] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0].shape[-2] == _PROBE_TEXT_LENGTH:
                seen[name] = None

        return hook

    config = unet.config
    side = 2 ** len(config.block_out_channels)
    dtype, device = unet.dtype, unet.device
    latents = torch.zeros(1, config.in_channels, side, side, dtype=dtype, device=device)
    text = torch.zeros(1, _PROBE_TEXT_LENGTH, config.cross_attention_dim, dtype=dtype, device=device)
    handles = []
    try:
        handles += [m.register_forward_pre_hook(note(name)) for name, m in linears.items()]
        unet(latents, 0, encoder_hidden_states=text)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen)
