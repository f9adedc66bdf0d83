"""How far similarities move with the precision of the weights, and whether a prediction depends on its batch.

    python -m benchmarks.precision --model demo --dtypes float32 float16 bfloat16

Captions are scored on their seeds under masks of random neurons of many sizes, so that similarities lie everywhere
between 0 and 1. They are compared with float64 on the processor. Then a batch of predictions is asked again: the same,
in another order, and each sample beside others. No bit may change.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from benchmarks.full_size import device_name
from benchmarks.merging import REFERENCE_MODEL
from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine import diffusion
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.precision import full_float32
from nemo_prune.engine.scorer import Scorer
from nemo_prune.mask import Neuron
from nemo_prune.models.demo import PROMPTS_FILE, demo_folder
from nemo_prune.models.source import load_predicting
from nemo_prune.settings import LocalizationSettings

_PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
# Shares of all neurons that are suppressed.
_SHARES = (0.003, 0.01, 0.05, 0.2, 1.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="`demo`, `reference` or a diffusers folder")
    parser.add_argument("--precisions", nargs="*", choices=_PRECISIONS, default=list(_PRECISIONS))
    parser.add_argument("--captions", type=int, default=12)
    parser.add_argument("--bits-only", action="store_true", help="compare nothing with float64")
    arguments = parser.parse_args()
    folder = {"demo": demo_folder(), "reference": REFERENCE_MODEL}.get(arguments.model, Path(arguments.model))
    file = folder if (folder / PROMPTS_FILE).exists() else demo_folder()
    texts = [prompt.text for prompt in read_prompts(file / PROMPTS_FILE, limit=arguments.captions)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = None if arguments.bits_only else similarities(load_predicting(folder, "cpu", torch.float64), texts)
    figures: dict = {"device": device_name(), "torch": torch.__version__, "model": arguments.model}
    for name in arguments.precisions:
        pipe = load_predicting(folder, device, torch.float32 if name == "tf32" else getattr(torch, name))
        with patch.object(diffusion, "full_float32", rounded_float32 if name == "tf32" else full_float32):
            figures[name] = {} if exact is None else moved(similarities(pipe, texts), exact)
            figures[name]["predictions that changed"] = changed_by_their_batch(pipe, texts)
    print(json.dumps(figures, indent=2))


@contextmanager
def rounded_float32() -> Iterator[None]:
    """TensorFloat-32 wherever torch can take it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with full_float32():
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        yield


def similarities(pipe: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    """Suppressed similarities [captions, masks, seeds]."""
    scorer = Scorer(NoisePredictor(pipe, LocalizationSettings()))
    masks, found = random_masks(scorer.predictor.sizes), []
    for text in texts:
        (scored,) = scorer.score_prompts([text])
        seeds = range(len(scored.latents))
        found.append([scorer.suppressed_similarities(scored, seeds, neurons) for neurons in masks])
    return torch.tensor(found)


def random_masks(sizes: dict[str, int]) -> list[list[Neuron]]:
    """Random neurons, the same in every call."""
    every = [Neuron(layer, index) for layer, size in sizes.items() for index in range(size)]
    return [random.Random(0).sample(every, max(1, round(share * len(every)))) for share in _SHARES]


def moved(found: Tensor, exact: Tensor) -> dict[str, float]:
    """How far similarities lie from the exact ones; near 0 the power of a scale's similarity stretches any error."""
    distances = (found - exact).abs()
    return {
        "median": distances.median().item(),
        "largest": distances.max().item(),
        "largest above .2": distances[exact > 0.2].max().item(),
    }


def changed_by_their_batch(pipe: StableDiffusionPipeline, texts: list[str]) -> dict[str, int]:
    """How many of a batch's predictions are not the same to the bit when they are asked again."""
    predictor = NoisePredictor(pipe, LocalizationSettings())
    masks, size = random_masks(predictor.sizes), predictor.batch_size
    embeds = predictor.encode(texts)
    latents = predictor.initial_latents(5, 2 * size)
    asked = [(latents[place], embeds[place % len(texts)], masks[place % len(masks)]) for place in range(2 * size)]

    def predict(places: list[int]) -> Tensor:
        chosen = [asked[place] for place in places]
        columns = [each[0] for each in chosen], [each[1] for each in chosen]
        return predictor.predict_each(*map(torch.stack, columns), [each[2] for each in chosen]).cpu()

    places = list(range(size))
    first = predict(places)
    turned = predict(places[::-1]).flip(0)
    beside = torch.cat([predict([place, *range(size, 2 * size - 1)])[:1] for place in places[:4]])
    return {
        "of": size,
        "asked again": differing(first, predict(places)),
        "in another order": differing(first, turned),
        "beside others, of 4": differing(first[:4], beside),
    }


def differing(a: Tensor, b: Tensor) -> int:
    """How many samples differ in any bit."""
    return int((a != b).flatten(1).any(dim=1).sum())


if __name__ == "__main__":
    main()
