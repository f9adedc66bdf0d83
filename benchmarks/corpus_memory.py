"""What a corpus of memorized captions keeps in memory, at the sizes of SD v1-4's latents and text embeddings.

    python -m benchmarks.corpus_memory --captions 1000 10000

The real stages (detection, predictions on fresh seeds, moments, judging) with a U-Net of the real class that has next
to no channels: what a corpus keeps has the size of latents, embeddings and layers' outputs, not of weights. Every
caption counts as memorized. Anonymous memory (Linux) is what the process has for itself; what is mapped from the work
folder is the system's to keep or to drop.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gone import FRESH_SEED
from nemo_prune.engine.localize import Localizer
from nemo_prune.engine.measures import measure_under
from nemo_prune.engine.memo import Memo
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.views import Seeds, observe
from nemo_prune.models.demo import demo_folder
from nemo_prune.settings import LocalizationSettings
from nemo_prune.stages.bar import FRESH_SEEDS

# Captions that are judged: each takes a while on a CPU, and keeps nothing.
JUDGED = 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, nargs="+", default=[1000, 10000])
    predictor = narrow_predictor()
    for number in parser.parse_args().captions:
        stages = " ".join(f"{stage} {value:.0f}" for stage, value in most_memory(predictor, number).items())
        print(f"{number} captions, MB beside the model: {stages}", flush=True)


def narrow_predictor() -> NoisePredictor:
    """A model with SD v1-4's latents (4x64x64) and text embeddings (77x768), and next to no channels."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(demo_folder() / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=768,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return NoisePredictor(pipe, LocalizationSettings())


def most_memory(predictor: NoisePredictor, number: int) -> dict[str, float]:
    """The most anonymous memory that each stage of a corpus has, in MB beside what was there before.

    Args:
        predictor: the model.
        number: of captions.
    """
    captions, found = [f"picture number {each}" for each in range(number)], {}
    threshold, before = -2.0, anonymous_memory()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        done, most = threading.Event(), [0.0]

        def watch() -> None:
            while not done.wait(0.05):
                most[0] = max(most[0], anonymous_memory())

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield
        finally:
            done.set()
            watching.join()
            found[name] = max(most[0], anonymous_memory()) - before

    with tempfile.TemporaryDirectory() as name:
        folder, memo = Path(name), Memo(Path(name) / "detected")
        unused = Calibration(0.0, 0.0, 1.0, None)
        localizer = Localizer(Scorer(predictor), unused, threshold, memo=memo)
        with stage("detection"):
            for start in range(0, number, 100):
                localizer.detect(captions[start : start + 100])
        seeds = Seeds.draw(predictor) + Seeds.draw(predictor, FRESH_SEED, FRESH_SEEDS)
        with stage("predictions"):
            memorized = observe(
                predictor, captions, seeds, folder=folder / "views",
                detected=lambda texts: [each.scored for each in localizer.detect(texts)],
            )  # fmt: skip
        with stage("judging"):
            measure_under(predictor, captions[:JUDGED], memorized, ())
        with stage("moments"):
            attended_moments(predictor, captions)
    return found


def anonymous_memory() -> float:
    """What the process has for itself, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
