"""What a U-Net pass costs at the full size of SD v1-4, with random weights, and the time of a corpus from it.

    python -m benchmarks.full_size --batch-sizes 1 2

The decisions of the search come from a stand-in with planted neurons, so that the time of a
verbatim-like prompt (25 candidates, 4 kept) and of a template-like one (675, 21) is what the search
and the passes take. On a GPU it runs in float16.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from nemo_prune.engine.layers import find_text_projections
from nemo_prune.engine.search import search_neurons
from nemo_prune.engine.selection import Candidates
from nemo_prune.mask import Neuron

_PROMPTS = {"verbatim-like": (25, 4), "template-like": (675, 21)}
_CORPUS = {"verbatim-like": 112, "template-like": 388}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 10, 20, 40])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if on_gpu else ("cpu", torch.float32)
    unet = full_size_unet().to(device, dtype)
    milliseconds = {size: pass_time(unet, size, arguments.repeats) for size in arguments.batch_sizes}
    fastest = min(milliseconds.values())
    trials = {name: count_trials(*sizes) for name, sizes in _PROMPTS.items()}
    seconds = {name: (10 + count) * fastest / 1000 for name, count in trials.items()}
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
                "dtype": str(dtype),
                "milliseconds_a_sample_pass": milliseconds,
                "teraflops_a_second": teraflops_a_pass() / (fastest / 1000),
                "share_before_the_first_text_layer": share_upstream(unet),
                "sample_passes": {name: 10 + count for name, count in trials.items()},
                "seconds_a_prompt": seconds,
                "minutes_for_112_verbatim_and_388_template_prompts": sum(
                    number * seconds[name] / 60 for name, number in _CORPUS.items()
                ),
            },
            indent=2,
        )
    )


def full_size_unet() -> UNet2DConditionModel:
    """SD v1-4's architecture with random weights."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()


@torch.no_grad()
def teraflops_a_pass() -> float:
    """Floating-point operations of one latent's pass, in 10^12, counted on tensors without data."""
    with torch.device("meta"):
        unet = full_size_unet()
    latents, text = _inputs(unet, 1)
    with FlopCounterMode(display=False) as counter:
        unet(latents, 961, encoder_hidden_states=text)
    return counter.get_total_flops() / 1e12


@torch.no_grad()
def pass_time(unet: UNet2DConditionModel, batch_size: int, repeats: int) -> float:
    """Milliseconds a latent at a batch size: the median of some batches after one to warm up."""
    latents, text = _inputs(unet, batch_size)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        unet(latents, 961, encoder_hidden_states=text)
        _wait()
        times.append((time.perf_counter() - began) * 1000 / batch_size)
    return median(times[1:])


@torch.no_grad()
def share_upstream(unet: UNet2DConditionModel) -> float:
    """The share of a pass that comes before the first layer that sees the text."""
    latents, text = _inputs(unet, 1)
    first, reached = next(iter(find_text_projections(unet).values())), []

    def note(*_: object) -> None:
        _wait()
        reached.append(time.perf_counter())

    handle = first.register_forward_pre_hook(note)
    try:
        began = time.perf_counter()
        unet(latents, 961, encoder_hidden_states=text)
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


def _inputs(unet: UNet2DConditionModel, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    like = {"device": unet.device, "dtype": unet.dtype}
    return torch.randn(batch_size, 4, 64, 64, **like), torch.randn(batch_size, 77, 768, **like)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
