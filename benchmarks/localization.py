"""What the engine costs beside the released code's procedure, and whether it finds the same neurons.

    python -m benchmarks.localization --out localization.json

Both run on the same model in the same process, prompt by prompt. The engine searches as `run` does, and once more
as `localize` and `--merge union` do, which ask about the sets on the way, too. The demo model's 25 prompts take some
minutes, nearly all of it the oracle's; --prompts takes fewer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch

from benchmarks.oracle import Oracle, agrees, largest_difference, lower_bound
from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_prompts
from nemo_prune.engine.scorer import Scorer
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, demo_folder
from nemo_prune.models.source import load_pipeline, resolve_model
from nemo_prune.settings import LocalizationSettings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="`demo` or a folder with prompts like the demo's")
    parser.add_argument("--prompts", type=int, help="take the first so many prompts only")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the engine; the median counts")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--memory-of", choices=("oracle", "engine"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(_peak_memory_alone(arguments))
        return
    figures = measure(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key != "prompts"}, indent=2))


def measure(arguments: argparse.Namespace) -> dict:
    """Every figure of one model."""
    folder, predictor, prompts, ordinary = _load(arguments)
    scorer = Scorer(predictor)
    began = time.perf_counter()
    calibration = calibrate(scorer, ordinary)
    calibration_seconds = time.perf_counter() - began
    threshold = calibration.threshold
    localizer = Localizer(scorer, calibration, threshold)

    engine, wall = {}, []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        engine = {each.prompt: each for each in localize_prompts(localizer, prompts)}
        wall.append(time.perf_counter() - began)
    checking = {each.prompt: each for each in localize_prompts(replace(localizer, check_way=True), prompts)}
    inside = _share_inside_the_unet(localizer, prompts)

    oracle = Oracle(NoisePredictor(predictor.pipe, predictor.settings), calibration.statistics, threshold)
    rows = []
    for prompt in prompts:
        rows.append(_row(oracle.localize(prompt), engine[prompt], checking[prompt]))
        print(f"\r{len(rows)} of {len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    return {
        "machine": {"device": predictor.pipe.unet.device.type, "threads": torch.get_num_threads()},
        "model": folder.name,
        "threshold": threshold,
        "agreeing": sum(row["agrees"] for row in rows),
        "agreeing_checked": sum(row["agrees_checked"] for row in rows),
        "of": len(rows),
        "largest_difference_of_scores": max(row["difference"] for row in rows),
        **_summary(rows, wall),
        "calibration_prompts_per_second": len(ordinary) / calibration_seconds,
        "share_of_time_inside_the_unet": inside,
        "peak_memory_mb": {name: _peak_memory(arguments, name) for name in ("oracle", "engine")},
        "prompts": rows,
    }


def _load(arguments: argparse.Namespace) -> tuple[Path, NoisePredictor, list[str], list[str]]:
    source = resolve_model(arguments.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = NoisePredictor(load_pipeline(source.folder, device, torch.float32), LocalizationSettings())
    folder = demo_folder() if arguments.model == "demo" else source.folder
    prompts = [prompt.text for prompt in read_prompts(folder / PROMPTS_FILE)][: arguments.prompts]
    return folder, predictor, prompts, [prompt.text for prompt in read_prompts(folder / CALIBRATION_FILE)]


def _row(plain: PromptLocalization, found: PromptLocalization, checked: PromptLocalization) -> dict:
    bound = lower_bound(10, len(found.kept_seeds), len(found.neurons)) if found.kept_seeds else 10
    return {
        "status": plain.status,
        "agrees": agrees(plain, found),
        "agrees_checked": agrees(plain, checked),
        "difference": largest_difference(plain, found),
        "kept_seeds": len(plain.kept_seeds),
        "candidates": len(plain.candidates),
        "neurons": len(plain.neurons),
        "not_monotone": found.fell_back,
        "not_monotone_checked": checked.fell_back,
        "margin": found.margin,
        "oracle_passes": plain.sample_passes,
        "engine_passes": found.sample_passes,
        "checked_passes": checked.sample_passes,
        "lower_bound": bound,
        "oracle_seconds": plain.seconds,
    }


def _summary(rows: list[dict], wall: list[float]) -> dict:
    memorized = [row for row in rows if row["kept_seeds"]]
    ratios = [row["oracle_passes"] / row["engine_passes"] for row in memorized]
    over_bound = [row["engine_passes"] / row["lower_bound"] for row in memorized]
    oracle_seconds = sum(row["oracle_seconds"] for row in rows)
    return {
        "sample_passes": {
            name: sum(row[f"{name}_passes"] for row in memorized) for name in ("oracle", "engine", "checked")
        },
        "passes_ratio": {
            "of_sums": sum(row["oracle_passes"] for row in memorized) / sum(row["engine_passes"] for row in memorized),
            "median": median(ratios),
            "mean": mean(ratios),
            "least": min(ratios),
        },
        "passes_over_the_lower_bound": {"median": median(over_bound), "most": max(over_bound)},
        "not_monotone": sum(row["not_monotone"] for row in rows),
        "not_monotone_checked": sum(row["not_monotone_checked"] for row in rows),
        "seconds": {"oracle": oracle_seconds, "engine": wall, "ratio": oracle_seconds / median(wall)},
    }


def _share_inside_the_unet(localizer: Localizer, prompts: list[str]) -> float:
    """The share of a run's wall time that its U-Net passes take."""
    unet, seconds, began = localizer.scorer.predictor.pipe.unet, [0.0], [0.0]

    def before(*_: object) -> None:
        began[0] = time.perf_counter()

    def after(*_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[0] += time.perf_counter() - began[0]

    handles = [unet.register_forward_pre_hook(before), unet.register_forward_hook(after)]
    try:
        start = time.perf_counter()
        for _ in localize_prompts(localizer, prompts[:8]):
            pass
        return seconds[0] / (time.perf_counter() - start)
    finally:
        for handle in handles:
            handle.remove()


def _peak_memory(arguments: argparse.Namespace, name: str) -> float:
    """Peak memory of a process of its own that localizes one prompt, in MB."""
    command = [sys.executable, "-m", "benchmarks.localization", "--model", arguments.model, "--memory-of", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_memory_alone(arguments: argparse.Namespace) -> float:
    _, predictor, prompts, ordinary = _load(arguments)
    scorer = Scorer(predictor)
    calibration = calibrate(scorer, ordinary[:50])
    if arguments.memory_of == "engine":
        next(localize_prompts(Localizer(scorer, calibration, calibration.threshold), prompts[:1]))
    else:
        Oracle(predictor, calibration.statistics, calibration.threshold).localize(prompts[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
