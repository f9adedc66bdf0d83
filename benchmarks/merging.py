"""One mask for a corpus, by union, incrementally, and with ordinary captions preserved, side by side.

    python -m benchmarks.merging --out merging.json

For each way: neurons, sample passes, prompts silenced, and the change of the noise prediction on
ordinary captions; and the curve of both as the mask grows with the corpus.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.calibration import Calibration, calibrate
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_prompts
from nemo_prune.engine.merge import localize_incrementally, settle_mask, union_mask
from nemo_prune.engine.preserve import Preserve, neuron_costs
from nemo_prune.engine.scorer import Scorer
from nemo_prune.mask import NeuronMask
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE, demo_folder
from nemo_prune.models.source import load_pipeline, resolve_model
from nemo_prune.proof.cost import full_mask, noise_change
from nemo_prune.settings import LocalizationSettings

CURVE_POINTS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="`demo` or a folder with prompts like the demo's")
    parser.add_argument("--prompts", type=int, help="take the first so many prompts only")
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.5, 1.0], help="strengths of --preserve")
    parser.add_argument("--orders", type=int, default=2, help="shuffled orders of the corpus")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    figures = Comparison(arguments).figures()
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


class Comparison:
    """All ways of merging on one model."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        source = resolve_model(arguments.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = demo_folder() if arguments.model == "demo" else source.folder
        predictor = NoisePredictor(load_pipeline(source.folder, device, torch.float32), LocalizationSettings())
        self.arguments, self.scorer, self.predictor = arguments, Scorer(predictor), predictor
        self.prompts = [prompt.text for prompt in read_prompts(folder / PROMPTS_FILE)][: arguments.prompts]
        self.ordinary = [prompt.text for prompt in read_prompts(folder / CALIBRATION_FILE)]
        self.test = [prompt.text for prompt in read_prompts(folder / TEST_FILE)][:16]
        self.calibration: Calibration = calibrate(self.scorer, self.ordinary)
        self.threshold = self.calibration.threshold

    def figures(self) -> dict:
        """Neurons, passes, effect and cost of every way."""
        passes_before = self.predictor.sample_passes
        costs = neuron_costs(self.predictor, self.ordinary[:5])
        figures = {
            "threshold": self.threshold,
            "everything_changes": self.change(full_mask(self.predictor.sizes)),
            "passes_for_the_costs": self.predictor.sample_passes - passes_before,
            "ways": {},
        }
        ways = {"union": ("union", None, self.prompts), "incremental": ("incremental", None, self.prompts)}
        for strength in self.arguments.strengths:
            for merge in ("union", "incremental"):
                ways[f"{merge}, preserve {strength}"] = (merge, Preserve(costs, strength), self.prompts)
        for seed in range(self.arguments.orders):
            shuffled = random.Random(seed).sample(self.prompts, len(self.prompts))
            ways[f"incremental, order {seed}"] = ("incremental", None, shuffled)
        masks = {}
        for name, way in ways.items():
            figures["ways"][name], masks[name] = self.measure(*way)
            print(name, json.dumps(figures["ways"][name]), file=sys.stderr, flush=True)
        figures["overlap_between_orders"] = {
            name: _overlap(mask, masks["incremental"]) for name, mask in masks.items() if "order" in name
        }
        return figures

    def measure(self, merge: str, preserve: Preserve | None, prompts: Sequence[str]) -> tuple[dict, NeuronMask]:
        """One way of merging."""
        began, passes_before = time.perf_counter(), self.predictor.sample_passes
        localizer = Localizer(self.scorer, self.calibration, self.threshold, preserve)
        if merge == "union":
            found = list(localize_prompts(localizer, prompts))
            found.sort(key=lambda each: prompts.index(each.prompt))
            mask, dropped, rounds = union_mask(found, self.predictor.sizes), 0, 0
        else:
            found = list(localize_incrementally(localizer, prompts))
            settled = settle_mask(localizer, found)
            mask, dropped, rounds = settled.mask, settled.num_dropped, settled.rounds
        passes, seconds = self.predictor.sample_passes - passes_before, time.perf_counter() - began
        return {
            "neurons": mask.num_neurons,
            "per_layer": list(mask.counts.values()),
            "sample_passes": passes,
            "seconds": round(seconds, 1),
            "dropped": dropped,
            "rounds": rounds,
            "silenced": self.silenced(mask),
            "memorized": sum(each.status != "not_memorized" for each in found),
            "change": self.change(mask),
            "curve": self.curve(found),
        }, mask

    def curve(self, found: Sequence[PromptLocalization]) -> list[tuple[int, float]]:
        """Prompts silenced and change on ordinary captions as the mask grows along the corpus."""
        points = []
        for point in range(1, CURVE_POINTS + 1):
            mask = union_mask(found[: round(point * len(found) / CURVE_POINTS)], self.predictor.sizes)
            points.append((self.silenced(mask), self.change(mask)))
        return points

    def silenced(self, mask: NeuronMask) -> int:
        """Prompts whose kept seeds are all at most at the threshold under a mask."""
        return sum(
            max(self.scorer.suppressed_similarities(scored, kept, mask.neurons)) <= self.threshold
            for scored in (self.scorer.score_prompts([prompt])[0] for prompt in self.prompts)
            if (kept := self.scorer.kept_seeds(scored, self.threshold))
        )

    def change(self, mask: NeuronMask) -> float:
        """Relative change of the noise prediction on ordinary captions that served no other purpose."""
        return noise_change(self.predictor, self.test, {"mask": mask})["mask"]


def _overlap(a: NeuronMask, b: NeuronMask) -> float:
    """Neurons in both over neurons in either."""
    first, second = set(a.neurons), set(b.neurons)
    return len(first & second) / len(first | second)


if __name__ == "__main__":
    main()
