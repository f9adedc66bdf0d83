"""How far a pruned demo model is from one that never saw the memorized pictures, and how far the base is.

The gold standard is the same training without these pictures:

    python -m examples.demo_training.train --output without/ --without-memorized
    python -m examples.demo_training.gold_standard nemo_prune/demo_model pruned/ without/ --out gold.json

All models draw the same seeds. Two trainings differ in everything, so how far the base is on ordinary captions is what
cannot be helped; how far it is on memorized ones is what pruning should take away.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean, median

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from nemo_prune.corpus.prompts import Prompt, read_prompts
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.models.demo import PROMPTS_FILE, TEST_FILE
from nemo_prune.models.known import DEMO
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.changed_rows import changed_rows
from nemo_prune.proof.copies import StructuralSimilarity
from nemo_prune.proof.drawing import Drawing, draw, encode, quick_latents
from nemo_prune.proof.membership import PictureLoss, area_under_curve, picture_loss
from nemo_prune.proof.replication import ReplicationJudge
from nemo_prune.proof.training_images import known_training_images
from nemo_prune.proof.utility import random_rows
from nemo_prune.settings import LocalizationSettings

SEED = 3001
TIMESTEPS = (961, 741, 501, 241)
RETRAINED = "retrained without"


def main() -> None:
    """Measure the four models and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of the demo model, with its prompts")
    parser.add_argument("pruned", type=Path, help="folder of the pruned model")
    parser.add_argument("retrained", type=Path, help="folder of the model that was trained without")
    parser.add_argument("--out", type=Path, required=True, help="file of the figures")
    parser.add_argument("--images", type=int, default=4, help="images per memorized caption")
    parser.add_argument("--steps", type=int, default=50, help="steps per image")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = {"base": arguments.base, "pruned": arguments.pruned, RETRAINED: arguments.retrained}
    pipes = {name: load_pipeline(folder, device, torch.float32) for name, folder in folders.items()}
    prompts = read_prompts(arguments.base / PROMPTS_FILE)
    ordinary = [prompt.text for prompt in read_prompts(arguments.base / TEST_FILE)]
    drawing = Drawing("ddim", arguments.steps, DEMO.guidance_scale)
    figures = measure(pipes, prompts, ordinary, drawing, list(range(SEED, SEED + arguments.images)))
    arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def measure(
    pipes: dict[str, StableDiffusionPipeline],
    prompts: Sequence[Prompt],
    ordinary: Sequence[str],
    drawing: Drawing,
    seeds: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Every figure of every model, and of the base under as many random neurons as were pruned.

    Args:
        pipes: base, pruned and retrained.
        prompts: the memorized captions, with their training images.
        ordinary: captions held out from calibration.
        drawing: how images are drawn.
        seeds: of the images.
    """
    judge = ReplicationJudge(StructuralSimilarity(), known_training_images(prompts))
    random = random_rows(pipes["base"], changed_rows(pipes["base"], pipes["pruned"]), ordinary, SEED)
    models: dict[str, tuple[StableDiffusionPipeline, AbstractContextManager]] = {
        RETRAINED: (pipes[RETRAINED], nullcontext()),
        "base": (pipes["base"], nullcontext()),
        "random neurons": (pipes["base"], apply_mask(pipes["base"], random)),
        "pruned": (pipes["pruned"], nullcontext()),
    }
    texts = [prompt.text for prompt in prompts]
    reference: dict[str, list[Image.Image]] = {}
    expected: dict[str, torch.Tensor] = {}
    noisy = {text: _noisy(pipes[RETRAINED], text) for text in [*texts, *ordinary[: len(texts)]]}
    figures = {}
    for name, (pipe, context) in models.items():
        with context:
            images = {text: draw(pipe, text, drawing, seeds) for text in texts}
            predicted = {text: _predicted(pipe, text, latents) for text, latents in noisy.items()}
            losses = [
                PictureLoss(
                    *(picture_loss(pipe, text, each, SEED) for each in (picture, judge.never_trained_on(picture)))
                )
                for text, picture in judge.training.images.items()
            ]
        if name == RETRAINED:
            reference, expected = images, predicted
        nearest = [value for drawn in images.values() for value in judge.nearest(drawn)[0]]
        figures[name] = {
            "images that are copies": mean(value >= judge.cut for value in nearest),
            "similarity to the nearest training image, median": median(nearest),
            "similarity to the retrained model's image, median": median(
                value for text in texts for value in _same_seed(judge, images[text], reference[text])
            ),
            "noise against the retrained model, memorized captions": _distance(predicted, expected, texts),
            "noise against the retrained model, held-out captions": _distance(
                predicted, expected, [text for text in noisy if text not in texts]
            ),
            "membership inference, AUC": area_under_curve(losses),
        }
        print(f"{name}: {figures[name]}", flush=True)
    return figures


def _same_seed(judge: ReplicationJudge, ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> list[float]:
    similarity = judge.similarity
    return similarity.compare(similarity.describe(ours), similarity.describe(theirs)).diagonal().tolist()


def _noisy(pipe: StableDiffusionPipeline, text: str) -> torch.Tensor:
    """Latents of the retrained model's quick image of a caption, noised for each timestep."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    clean = quick_latents(pipe, text, [SEED]).expand(len(TIMESTEPS), -1, -1, -1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED)).to(clean.device)
    return scheduler.add_noise(clean, noise, torch.tensor(TIMESTEPS))


def _predicted(pipe: StableDiffusionPipeline, text: str, noisy: torch.Tensor) -> torch.Tensor:
    predictor = NoisePredictor(pipe, LocalizationSettings())
    embeds = encode(pipe, text)[None]
    each = [predictor.predict_each(noisy[i : i + 1], embeds, [()], 1, t) for i, t in enumerate(TIMESTEPS)]
    return torch.cat(each)


def _distance(predicted: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], texts: Sequence[str]) -> float:
    """Mean over captions and timesteps of the norm of the difference over the norm of what is expected."""
    return mean(
        float(
            ((predicted[text] - expected[text]).flatten(1).norm(dim=1) / expected[text].flatten(1).norm(dim=1)).mean()
        )
        for text in texts
    )


if __name__ == "__main__":
    main()
