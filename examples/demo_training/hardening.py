"""What row edits can do against the attack on the demo model: attack share against utility, as a table.

python -m examples.demo_training.hardening nemo_prune/demo_model pruned/nemo_prune/mask.safetensors --out harden.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from diffusers import StableDiffusionPipeline

from nemo_prune.corpus.prompts import Prompt, read_prompts
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.files.json_values import to_json
from nemo_prune.mask import NeuronMask, Pruning
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE
from nemo_prune.models.known import DEMO
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.attack import AttackSettings, attack
from nemo_prune.proof.changed_rows import changed_rows
from nemo_prune.proof.copies import StructuralSimilarity
from nemo_prune.proof.hardening import harden, pruned_copy
from nemo_prune.proof.intervals import Rate
from nemo_prune.proof.passes import PassCounter
from nemo_prune.proof.replication import ReplicationJudge
from nemo_prune.proof.sampling import stratified
from nemo_prune.proof.training_images import known_training_images
from nemo_prune.proof.utility import NoiseJudge, random_rows

SEED, EVALUATION_SEED = 5001, 9_005_001
NUM_HARDENED, NUM_OTHERS, NUM_UTILITY, NUM_USUAL = 3, 2, 8, 100


def main() -> None:
    """Harden over rounds, evaluate every model and write the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the demo model, with its prompts")
    parser.add_argument("mask", type=Path, help="the mask that the hardening begins with")
    parser.add_argument("--out", type=Path, required=True, help="file of the table")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.model, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    prompts = read_prompts(arguments.model / PROMPTS_FILE)
    prompts = [prompts[place] for place in stratified(prompts)][: NUM_HARDENED + NUM_OTHERS]
    usual = [prompt.text for prompt in read_prompts(arguments.model / CALIBRATION_FILE)][:NUM_USUAL]
    held_out = [prompt.text for prompt in read_prompts(arguments.model / TEST_FILE)][:NUM_UTILITY]
    judge = ReplicationJudge(StructuralSimilarity(), known_training_images(prompts))
    sizes = layer_sizes(find_text_projections(pipe.unet, "both"))
    values = find_text_projections(pipe.unet, "value")
    mask = NeuronMask.from_neurons(NeuronMask.load(arguments.mask).neurons, sizes)
    everything = NeuronMask(
        {name: torch.full((size,), name in values, dtype=torch.bool) for name, size in sizes.items()}
    )
    rows = []

    def evaluate(name: str, pruning: Pruning) -> None:
        rows.append({"model": name, "neurons": pruning.mask.num_neurons, "scale": pruning.scale,
                     **_evaluated(pipe, pruning, prompts, held_out, judge)})  # fmt: skip
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
        print(rows[-1], flush=True)

    evaluate("mask", Pruning(mask))
    targets = [(prompt.text, judge.training.images[prompt.text]) for prompt in prompts[:NUM_HARDENED]]
    found = harden(pipe, mask, targets, usual, judge, DEMO.guidance_scale, AttackSettings(), arguments.rounds, SEED)
    for turn, each in enumerate(found, start=1):
        hardened = NeuronMask.from_neurons(each.neurons, sizes)
        print({"round": turn, "came back": each.came_back, "silenced": each.silenced}, flush=True)
        evaluate(f"hardened, {turn} rounds", Pruning(hardened))
    other = random_rows(pipe, changed_rows(pipe, pruned_copy(pipe, Pruning(hardened))), usual, SEED)
    evaluate("as many random neurons as hardened", Pruning(other))
    evaluate("mask, rows scaled by -1", Pruning(mask, -1.0))
    evaluate("hardened, rows scaled by -1", Pruning(hardened, -1.0))
    evaluate("every value neuron", Pruning(everything))


def _evaluated(
    pipe: StableDiffusionPipeline,
    pruning: Pruning,
    prompts: Sequence[Prompt],
    held_out: Sequence[str],
    judge: ReplicationJudge,
) -> dict:
    """Attack share and utility of one pruning, on seeds that no hardening saw."""
    candidate = pruned_copy(pipe, pruning)
    steps, curves = [], []
    for place, prompt in enumerate(prompts):
        outcome = attack(
            candidate, judge.training.images[prompt.text], prompt.text, "caption", held_out[0], judge,
            DEMO.guidance_scale, AttackSettings(), PassCounter(), EVALUATION_SEED + 100 * place,
        )  # fmt: skip
        steps.append(outcome.steps)
        curves.append(max(outcome.curve))
    noise = NoiseJudge(pipe, candidate, changed_rows(pipe, pipe), held_out, SEED)
    changes = [mean(noise.change(text).relative_error["candidate"]) for text in held_out]
    hardened, others = steps[:NUM_HARDENED], steps[NUM_HARDENED:]
    return {
        "came back": to_json(Rate.of(sum(step is not None for step in steps), len(steps))),
        "came back, hardened against": sum(step is not None for step in hardened),
        "came back, others": sum(step is not None for step in others),
        "steps": steps,
        "highest similarity": curves,
        "utility loss": mean(changes),
    }


if __name__ == "__main__":
    main()
