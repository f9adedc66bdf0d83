import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from conftest import TEXT_WIDTH, tiny_unet
from nemo_prune.engine.layers import find_text_projections
from nemo_prune.errors import ModelError

SEVEN_LAYERS = [
    *(f"down_blocks.{b}.attentions.{a}.transformer_blocks.0.attn2" for b in range(3) for a in range(2)),
    "mid_block.attentions.0.transformer_blocks.0.attn2",
]


@pytest.mark.parametrize(("projection", "suffix"), [("value", "to_v"), ("key", "to_k")])
def test_the_papers_seven_layers_in_the_order_of_execution(projection, suffix):
    layers = find_text_projections(tiny_unet(), projection)
    assert list(layers) == [f"{name}.{suffix}" for name in SEVEN_LAYERS]
    assert all(layer.in_features == TEXT_WIDTH for layer in layers.values())


def test_a_unet_without_text_is_refused_with_what_it_has():
    unet = tiny_unet(
        down_block_types=("AttnDownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        mid_block_type="UNetMidBlock2D",
    )
    with pytest.raises(ModelError, match=r"down_blocks\.0\.attentions\.0\.to_v"):
        find_text_projections(unet)


def test_keys_and_values_together_come_in_the_order_of_execution():
    assert list(find_text_projections(tiny_unet(), "both")) == [
        f"{name}.{suffix}" for name in SEVEN_LAYERS for suffix in ("to_k", "to_v")
    ]


def test_fused_projections_are_refused():
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(ModelError, match="unfuse_qkv_projections"):
        find_text_projections(unet)
    unet.unfuse_qkv_projections()
    assert any(isinstance(module, Attention) for module in unet.modules())
    assert len(find_text_projections(unet)) == 7


def test_an_attached_lora_is_refused():
    peft = pytest.importorskip("peft")
    unet = tiny_unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_v"]))
    with pytest.raises(ModelError, match="unload_lora_weights"):
        find_text_projections(unet)


def test_quantised_weights_are_refused():
    unet = tiny_unet()
    quantised = torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ModelError, match="quantised"):
        find_text_projections(quantised)


def test_integer_weights_are_refused():
    unet = tiny_unet()
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        find_text_projections(unet)
