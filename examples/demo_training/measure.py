"""Measure whether a demo model behaves like the real thing: does it memorize, and does pruning help?

Writes figures.json and before/after grids. On two CPU cores it takes some ten minutes:

    python -m examples.demo_training.measure nemo_prune/demo_model --out measured/
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch
from PIL import Image

from nemo_prune.corpus.prompts import Prompt, read_prompts
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_prompts
from nemo_prune.engine.merge import union_mask
from nemo_prune.engine.scorer import Scorer
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE
from nemo_prune.models.known import DEMO
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.cost import full_mask, matched_random_mask, noise_change
from nemo_prune.proof.images import copy_similarities, draw_images, image_similarities, save_grid
from nemo_prune.proof.scores import score_under_mask
from nemo_prune.settings import LocalizationSettings, VerificationSettings

NUM_ORDINARY_DRAWN = 16
NUM_COST_PROMPTS = 32
NUM_HUB_PROMPTS = 8
NUM_RANDOM_DRAWS = 5
ENOUGH_SEEDS = 0.9

Images = dict[str, list[Image.Image]]


def main() -> None:
    """Measure a model folder and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the demo model, with its prompts")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and grids")
    parser.add_argument("--images-per-prompt", type=int, default=10)
    parser.add_argument("--num-inference-steps", type=int, default=50)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figures = measure(arguments.model, arguments.out, arguments.images_per_prompt, arguments.num_inference_steps)
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key != "captions"}, indent=2))


def measure(folder: Path, out: Path, images_per_prompt: int, num_inference_steps: int) -> dict:
    """Every figure of one model; grids go to ``out``."""
    started = time.perf_counter()
    pipe = load_pipeline(folder, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    predictor = NoisePredictor(pipe, LocalizationSettings())
    scorer = Scorer(predictor)
    prompts = read_prompts(folder / PROMPTS_FILE)
    ordinary_texts = [prompt.text for prompt in read_prompts(folder / CALIBRATION_FILE)]
    calibration = calibrate(scorer, ordinary_texts, _say("calibrate"))
    texts = [prompt.text for prompt in prompts]
    localizer = Localizer(scorer, calibration, calibration.threshold)
    localizations = sorted(
        localize_prompts(localizer, texts),
        key=lambda localization: texts.index(localization.prompt),
    )
    mask = union_mask(localizations, predictor.sizes)
    random_masks = [matched_random_mask(mask, calibration.statistics.mean, seed) for seed in range(NUM_RANDOM_DRAWS)]

    verification = replace(
        VerificationSettings(),
        images_per_prompt=images_per_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=DEMO.guidance_scale,
    )
    test = read_prompts(folder / TEST_FILE)
    ordinary = test[:NUM_ORDINARY_DRAWN]
    shown = prompts + ordinary

    def drawn(name: str, context: AbstractContextManager, shown: Sequence[Prompt]) -> Images:
        with context:
            return {prompt.text: _draw(pipe, prompt, verification, name) for prompt in shown}

    before = drawn("images before", nullcontext(), shown)
    after = drawn("images under the mask", apply_mask(pipe, mask), shown)
    controlled = drawn("images under random neurons", apply_mask(pipe, random_masks[0]), prompts)
    training = {prompt.text: Image.open(prompt.image) for prompt in prompts if prompt.image}
    save_grid(
        out / "memorized.png",
        [
            [training.get(p.text), *before[p.text][:4], None, *after[p.text][:4], None, *controlled[p.text][:2]]
            for p in prompts
        ],
    )
    save_grid(out / "ordinary.png", [[*before[p.text][:4], None, *after[p.text][:4]] for p in ordinary])

    verbatim = [training[prompt.text] for prompt in prompts if prompt.kind == "VM"]
    conditions = {"before": before, "after": after, "random": controlled}
    return {
        "images_per_prompt": images_per_prompt,
        "num_inference_steps": num_inference_steps,
        "score": _score_figures(scorer, prompts, localizations, test, calibration.threshold),
        "localization": _localization_figures(localizer, prompts, localizations, mask),
        "replication": {
            name: _replication_figures(prompts, images, verbatim, verification.replication_cut)
            for name, images in conditions.items()
        },
        "ordinary": _ordinary_figures(ordinary, before, after, verbatim),
        "noise_change": _cost_figures(predictor, ordinary_texts, mask, random_masks),
        "hubs": _hub_figures(predictor, ordinary_texts),
        "captions": _caption_figures(prompts, localizations, before, after, controlled, training, verbatim),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }


def _draw(pipe, prompt: Prompt, verification: VerificationSettings, name: str) -> list[Image.Image]:
    print(f"\r{name}: {prompt.text[:60]:60}", end="", flush=True)
    return draw_images(pipe, prompt.text, verification)


def _score_figures(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    localizations: Sequence[PromptLocalization],
    test: Sequence[Prompt],
    threshold: float,
) -> dict[str, float]:
    """How well the memorization score tells memorized captions from ordinary ones."""
    scores: dict[str, list[float]] = {"VM": [], "TM": [], "ordinary": []}
    for prompt, localization in zip(prompts, localizations, strict=True):
        scores[prompt.kind].append(localization.score)
    for prompt in test:
        (scored,) = scorer.score_prompts([prompt.text])
        scores["ordinary"].append(scored.memorization.score)
    return {
        "threshold": threshold,
        "auroc_VM": _auroc(scores["VM"], scores["ordinary"]),
        "auroc_TM": _auroc(scores["TM"], scores["ordinary"]),
        "ordinary_above_the_threshold": mean(score > threshold for score in scores["ordinary"]),
        **{f"median_{kind}": median(values) for kind, values in scores.items()},
    }


def _localization_figures(
    localizer: Localizer,
    prompts: Sequence[Prompt],
    localizations: Sequence[PromptLocalization],
    mask: NeuronMask,
) -> dict:
    found = {
        kind: [each for prompt, each in zip(prompts, localizations, strict=True) if prompt.kind == kind]
        for kind in ("VM", "TM")
    }
    memorized = found["VM"] + found["TM"]
    localized = [each for each in memorized if each.status == "localized"]
    fresh = localizer.scorer.predictor.initial_latents(seed=VerificationSettings().score_seed)
    verified = score_under_mask(localizer, localizer.scorer, memorized, mask, fresh)
    sizes = sorted(len(each.neurons) for each in localized)
    return {
        "status": {
            kind: {
                status: sum(each.status == status for each in group)
                for status in ("localized", "not_memorized", "unresolved")
            }
            for kind, group in found.items()
        },
        "neurons_per_caption": {"least": sizes[0], "median": median(sizes), "most": sizes[-1]} if sizes else None,
        "sample_passes_per_caption": [each.sample_passes for each in memorized],
        "union": mask.num_neurons,
        "union_per_layer": list(mask.counts.values()),
        "of": sum(mask.sizes.values()),
        "above_threshold_under_the_mask": sum(
            v.suppressed_similarity is not None and v.suppressed_similarity > localizer.threshold for v in verified
        ),
        "fresh_score_before": median(v.score_before for v in verified),
        "fresh_score_after": median(v.score_after for v in verified),
    }


def _replication_figures(
    prompts: Sequence[Prompt], images: Images, verbatim: Sequence[Image.Image], cut: float
) -> dict[str, float]:
    """How many of the verbatim captions give copies back, judged against every verbatim training image."""
    similarities = [
        copy_similarities(images[prompt.text], verbatim).amax(dim=1) for prompt in prompts if prompt.kind == "VM"
    ]
    shares = [float((values >= cut).float().mean()) for values in similarities]
    return {
        "cut": cut,
        "captions": len(shares),
        "captions_with_copies_in_nine_of_ten_seeds": sum(share >= ENOUGH_SEEDS for share in shares),
        "captions_with_any_copy": sum(share > 0 for share in shares),
        "share_of_copies": mean(shares),
        "median_similarity": float(torch.cat(similarities).median()),
        "highest_similarity": float(torch.cat(similarities).max()),
    }


def _ordinary_figures(
    ordinary: Sequence[Prompt], before: Images, after: Images, verbatim: Sequence[Image.Image]
) -> dict[str, float]:
    """Change of the images beside the change between two seeds, both as 1 - SSIM and colour distance."""
    changes, between, colour_changes, colour_between, nearest = [], [], [], [], []
    for prompt in ordinary:
        old, new = before[prompt.text], after[prompt.text]
        changes.append(1 - float(image_similarities(old, new).diagonal().mean()))
        between.append(1 - float(image_similarities(old, old[1:] + old[:1]).diagonal().mean()))
        colour_changes.append(_colour_distance(old, new))
        colour_between.append(_colour_distance(old, old[1:] + old[:1]))
        nearest.append(float(copy_similarities(old + new, verbatim).max()))
    return {
        "captions": len(ordinary),
        "change_under_the_mask": mean(changes),
        "change_between_two_seeds": mean(between),
        "colour_change_under_the_mask": mean(colour_changes),
        "colour_change_between_two_seeds": mean(colour_between),
        "highest_similarity_to_a_training_image": max(nearest),
    }


def _colour_distance(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
    """Mean difference of the pictures' mean colours, in 0..1."""
    colours = [torch.tensor([[*image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))] for image in s]) / 255
               for s in (a, b)]  # fmt: skip
    return float((colours[0] - colours[1]).abs().mean())


def _cost_figures(
    predictor: NoisePredictor, texts: Sequence[str], mask: NeuronMask, random_masks: Sequence[NeuronMask]
) -> dict[str, float]:
    masks = {"mask": mask, "everything": full_mask(predictor.sizes)}
    masks |= {f"random {i}": random_mask for i, random_mask in enumerate(random_masks)}
    changes = noise_change(predictor, texts[:NUM_COST_PROMPTS], masks)
    return {
        "mask": changes["mask"],
        "random": mean(changes[f"random {i}"] for i in range(len(random_masks))),
        "everything": changes["everything"],
        "mask_over_everything": changes["mask"] / changes["everything"],
    }


def _hub_figures(predictor: NoisePredictor, texts: Sequence[str]) -> list[float]:
    """The largest change on ordinary captions that one neuron makes, for each layer."""
    largest = []
    for layer, size in predictor.sizes.items():
        masks = {i: NeuronMask.from_neurons([Neuron(layer, i)], predictor.sizes) for i in range(size)}
        largest.append(max(noise_change(predictor, texts[:NUM_HUB_PROMPTS], masks, num_samples=1).values()))
    return largest


def _caption_figures(
    prompts: Sequence[Prompt],
    localizations: Sequence[PromptLocalization],
    before: Images,
    after: Images,
    controlled: Images,
    training: dict[str, Image.Image],
    verbatim: Sequence[Image.Image],
) -> list[dict]:
    rows = []
    for prompt, localization in zip(prompts, localizations, strict=True):
        own = [training[prompt.text]]
        rows.append(
            {
                "caption": prompt.text,
                "type": prompt.kind,
                "score": localization.score,
                "status": localization.status,
                "neurons": len(localization.neurons),
                "own_before": float(copy_similarities(before[prompt.text], own).median()),
                "own_after": float(copy_similarities(after[prompt.text], own).median()),
                "any_after": float(copy_similarities(after[prompt.text], verbatim).max()),
                "own_random": float(copy_similarities(controlled[prompt.text], own).median()),
            }
        )
    return rows


def _auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counting half."""
    difference = torch.tensor(positives)[:, None] - torch.tensor(negatives)[None, :]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def _say(stage: str) -> Callable[[int, int], None]:
    return lambda done, total: print(f"\r{stage}: {done} of {total:<60}", end="", flush=True)


if __name__ == "__main__":
    main()
