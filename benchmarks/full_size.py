"""What a U-Net pass costs at the full size of SD v1-4, with random weights, and the time of a corpus from it.

    python -m benchmarks.full_size --batch-sizes 1 2
    python -m benchmarks.full_size --dtypes float32 float16 --modes eager channels_last compiled

The decisions of the search come from a stand-in with planted neurons, so that the time of a
verbatim-like prompt (25 candidates, 4 kept) and of a template-like one (675, 21) is what the search
and the passes take. float32 is computed in full, as the search does it, without TensorFloat-32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from nemo_prune.engine.layers import find_text_projections
from nemo_prune.engine.precision import full_float32
from nemo_prune.engine.search import search_neurons
from nemo_prune.engine.selection import Candidates
from nemo_prune.mask import Neuron
from nemo_prune.settings import DTYPES

_PROMPTS = {"verbatim-like": (25, 4), "template-like": (675, 21)}
_CORPUS = {"verbatim-like": 112, "template-like": 388}
MODES = ("eager", "channels_last", "compiled")
# Of the matrices whose product says what the device reaches at most.
_SIDE = 8192


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 10, 20, 40])
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES[1:], default=["float32"])
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["eager"], help="compiled: at the last batch size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures, written as they come")
    arguments = parser.parse_args()
    figures: dict = {"device": device_name(), "torch": torch.__version__}
    sample_passes = {name: 10 + count_trials(*sizes) for name, sizes in _PROMPTS.items()}
    figures["sample_passes"] = sample_passes
    for name in arguments.dtypes:
        figures[name] = measure(getattr(torch, name), sample_passes, arguments)
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def measure(dtype: torch.dtype, sample_passes: dict[str, int], arguments: argparse.Namespace) -> dict:
    """Milliseconds a sample pass in every mode, what a corpus takes with the fastest one, and the memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with full_float32():
        peak = matmul_teraflops(device, dtype) if device == "cuda" else None
        modes, memory, share = {}, {}, None
        for mode in arguments.modes:
            with torch.device(device):
                unet: nn.Module = full_size_unet().to(dtype)
            if mode == "channels_last":
                unet = unet.to(memory_format=torch.channels_last)
            sizes = arguments.batch_sizes
            if mode == "compiled":
                unet, sizes = torch.compile(unet, dynamic=False), sizes[-1:]
            modes[mode], memory[mode] = {}, {}
            for size in sizes:
                modes[mode][size] = pass_time(unet, size, arguments.repeats)
                memory[mode][size] = peak_gigabytes()
            share = share or share_upstream(unet)
    fastest = min(milliseconds for figures in modes.values() for milliseconds in figures.values())
    reached = teraflops_a_pass() / (fastest / 1000)
    return {
        "milliseconds_a_sample_pass": modes,
        "share_before_the_first_text_layer": share,
        "peak_gigabytes": memory,
        "teraflops_a_second": reached,
        "of_a_product_of_matrices": peak and reached / peak,
        "minutes_for_112_verbatim_and_388_template_prompts": sum(
            _CORPUS[name] * count * fastest / 60_000 for name, count in sample_passes.items()
        ),
    }


def device_name() -> str:
    """What computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def full_size_unet(channels: int = 320, sample_size: int = 64) -> UNet2DConditionModel:
    """SD v1-4's architecture with random weights.

    Args:
        channels: of the first block; SD v1-4 has 320.
        sample_size: height and width of its latents; SD v1-4 has 64.
    """
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()


def full_size_vae() -> AutoencoderKL:
    """SD v1-4's autoencoder with random weights."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def full_size_text_encoder(**tokens: int) -> CLIPTextModel:
    """SD v1-4's text encoder with random weights.

    Args:
        tokens: numbers of the special tokens, where they are not CLIP's.
    """
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPTextModel(CLIPTextConfig(**sizes, **tokens))


@torch.no_grad()
def teraflops_a_pass() -> float:
    """Floating-point operations of one latent's pass, in 10^12, counted on tensors without data."""
    with torch.device("meta"):
        unet = full_size_unet()
    with FlopCounterMode(display=False) as counter:
        unet(*_inputs(unet, 1))
    return counter.get_total_flops() / 1e12


@torch.no_grad()
def matmul_teraflops(device: str, dtype: torch.dtype) -> float:
    """10^12 operations a second that a product of large matrices reaches: the device's peak in practice."""
    left, right = (torch.randn(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(11):
        _wait()
        began = time.perf_counter()
        left @ right
        _wait()
        times.append(time.perf_counter() - began)
    return 2 * _SIDE**3 / median(times[1:]) / 1e12


@torch.no_grad()
def pass_time(unet: nn.Module, batch_size: int, repeats: int) -> float:
    """Milliseconds a latent at a batch size: the median of some batches after two to warm up."""
    inputs = _inputs(unet, batch_size)
    forget_peak()
    times = []
    for _ in range(repeats + 2):
        _wait()
        began = time.perf_counter()
        unet(*inputs)
        _wait()
        times.append((time.perf_counter() - began) * 1000 / batch_size)
    return median(times[2:])


def forget_peak() -> None:
    """Measure anew what is allocated at most on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gigabytes() -> float | None:
    """What was allocated at most on the GPU since :func:`forget_peak`; None where there is none."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


@torch.no_grad()
def share_upstream(unet: UNet2DConditionModel) -> float:
    """The share of a pass that comes before the first layer that sees the text."""
    first, reached = next(iter(find_text_projections(unet).values())), []

    def note(*_: object) -> None:
        _wait()
        reached.append(time.perf_counter())

    handle = first.register_forward_pre_hook(note)
    try:
        began = time.perf_counter()
        unet(*_inputs(unet, 1))
        _wait()
        return (reached[0] - began) / (time.perf_counter() - began)
    finally:
        handle.remove()


def count_trials(num_candidates: int, num_kept: int) -> int:
    """Trials of a search whose kept neurons are spread evenly over the candidates, on ten seeds."""
    neurons = [Neuron("layer", index) for index in range(num_candidates)]
    kept = frozenset(neurons[:: num_candidates // num_kept][:num_kept])
    schedule = [Candidates(5 - 0.25 * k, k, tuple(neurons[: num_candidates * (k + 1) // 8])) for k in range(8)]
    search = search_neurons(schedule, range(10), 0.4, ["layer"])
    count, answers = 0, None
    try:
        while True:
            trials = search.send(answers)
            count += len(trials)
            answers = [0.1 if kept <= trial.neurons else 0.9 for trial in trials]
    except StopIteration:
        return count


def _inputs(unet: nn.Module, batch_size: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    like = {"device": unet.device, "dtype": unet.dtype}
    return torch.randn(batch_size, 4, 64, 64, **like), 961, torch.randn(batch_size, 77, 768, **like)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
