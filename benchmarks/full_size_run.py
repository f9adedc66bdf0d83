"""A whole run on the architecture of SD v1-4 with random weights: time and peak memory of every stage.

    python -m benchmarks.full_size_run --dtype float16 --prompts 8

Random weights memorize nothing. So the latents are let in a thousandth as strongly, and the text a hundred times as
strongly through the layers that are searched. Tau is put between what a caption's seeds share and what is left of it
with everything suppressed: then captions count as memorized, and neurons are found for them. The mask is without
meaning; what is asked of the device is what a real run asks of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from benchmarks.full_size import (
    device_name,
    forget_peak,
    full_size_text_encoder,
    full_size_unet,
    full_size_vae,
    peak_gigabytes,
)
from nemo_prune.compute.local import LocalSession
from nemo_prune.corpus.prompts import Corpus, Prompt, read_prompts
from nemo_prune.engine.layers import find_text_projections
from nemo_prune.models.demo import CALIBRATION_FILE, demo_folder
from nemo_prune.models.known import OrdinaryCaptions
from nemo_prune.models.source import ModelSource, resolve_model
from nemo_prune.progress import Advance, Listener, Stage
from nemo_prune.proof.cost import full_mask
from nemo_prune.run import prune_model
from nemo_prune.settings import DTYPES, LocalizationSettings, ModelOptions, Plan, VerificationSettings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--prompts", type=int, default=8, help="captions to examine")
    parser.add_argument("--calibration-prompts", type=int, default=50)
    parser.add_argument("--evidence-budget", type=int, default=VerificationSettings.evidence_budget)
    parser.add_argument("--channels", type=int, default=320, help="of the first block; fewer make a smaller model")
    parser.add_argument("--sample-size", type=int, default=64, help="side of the latents; likewise")
    parser.add_argument("--folder", type=Path, help="where 9 GB find room; the model stays there for the next time")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, written as they come")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        base = (arguments.folder or Path(name)) / "base"
        if not base.exists():
            write_random_model(base, arguments.channels, arguments.sample_size)
        print(json.dumps(measure(base, Path(name), arguments), indent=2))


def measure(base: Path, folder: Path, arguments: argparse.Namespace) -> dict:
    """Seconds and peak memory of the stages."""
    source = resolve_model(str(base))
    captions = [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)]
    examined = Corpus(tuple(Prompt(text) for text in captions[-arguments.prompts :]), 0)
    ordinary = OrdinaryCaptions.divided(captions[: arguments.calibration_prompts + 32])
    model = ModelOptions(dtype=arguments.dtype)
    threshold = threshold_between(source, model, examined.texts[0])
    listener = Watched(arguments.out)
    began = time.perf_counter()
    result = prune_model(
        source,
        examined,
        ordinary,
        Plan(
            folder / "pruned",
            settings=LocalizationSettings(threshold=threshold),
            model=model,
            verification=VerificationSettings(evidence_budget=arguments.evidence_budget),
        ),
        listener,
    )
    record = result.record
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "threshold": threshold,
        "localized, unresolved": [record.prompts.localized, record.prompts.unresolved],
        "neurons": record.mask.num_neurons,
        "seconds": round(time.perf_counter() - began, 1),
        "written": result.out is not None,
        "stages": listener.stages,
    }


def threshold_between(source: ModelSource, model: ModelOptions, text: str) -> float:
    """A tau that a caption's seeds pass, and with everything suppressed do not, if there is one."""
    session = LocalSession(source, model, LocalizationSettings())
    scorer = session.scorer
    (scored,) = scorer.score_prompts([text])
    above = scored.memorization.pairs.amax(dim=1).min().item()
    neurons = full_mask(session.sizes).neurons
    below = max(scorer.suppressed_similarities(scored, range(len(scored.latents)), neurons))
    session.free()
    return round((above + min(above, below)) / 2 - 1e-3, 4)


def write_random_model(folder: Path, channels: int, sample_size: int) -> None:
    """A pipeline of SD v1-4's parts with random weights, and the demo's tokens at CLIP's length."""
    torch.manual_seed(0)
    unet = full_size_unet(channels, sample_size)
    unet.conv_in.weight.data.div_(1000)
    for projection in find_text_projections(unet).values():
        projection.weight.data.mul_(100)
    tokenizer = CLIPTokenizer.from_pretrained(demo_folder() / "tokenizer", model_max_length=77)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    scheduler = DDIMScheduler.from_pretrained(demo_folder() / "scheduler", prediction_type="sample")
    StableDiffusionPipeline(
        full_size_vae(), full_size_text_encoder(**tokens), tokenizer, unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


class Watched(Listener):
    """Notes seconds and peak memory of the stages.

    Args:
        out: JSON file for what is known so far.

    Attributes:
        stages: by the key of the stage; those that come several times are added up.
    """

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self.stages: dict[str, dict] = {}

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Advance]:
        forget_peak()
        began = time.perf_counter()
        with super().stage(stage) as advance:
            yield advance
        figures = self.stages.setdefault(stage.key, {"seconds": 0.0, "peak_gigabytes": 0.0})
        figures["seconds"] = round(figures["seconds"] + time.perf_counter() - began, 1)
        figures["peak_gigabytes"] = round(max(figures["peak_gigabytes"], peak_gigabytes() or 0.0), 2)
        if self._out:
            self._out.write_text(json.dumps(self.stages, indent=2) + "\n")


if __name__ == "__main__":
    main()
