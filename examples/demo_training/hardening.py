"""What can be done against the attack on the demo model: attack share against utility, as a table.

python -m examples.demo_training.hardening nemo_prune/demo_model pruned/nemo_prune/mask.safetensors --out harden.json

Beside row edits stand two yardsticks, adversarial fine-tuning (arXiv 2507.16880) and Wanda pruning (arXiv 2406.18566),
see yardsticks.py. The demo model has no cross-attention in its up blocks, so no rows there. A row that is in the file
is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean, median

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from examples.demo_training.yardsticks import adversarially_tuned, wanda_pruned, with_unet
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
from nemo_prune.proof.drawing import Drawing, draw
from nemo_prune.proof.hardening import harden, pruned_copy
from nemo_prune.proof.intervals import Rate
from nemo_prune.proof.passes import PassCounter
from nemo_prune.proof.replication import ReplicationJudge
from nemo_prune.proof.sampling import stratified
from nemo_prune.proof.training_images import known_training_images
from nemo_prune.proof.utility import NoiseJudge, random_rows

SEED, EVALUATION_SEED = 5001, 9_005_001
NUM_HARDENED, NUM_OTHERS, NUM_UTILITY, NUM_DRAWN, NUM_USUAL = 3, 2, 8, 4, 100
ROUNDS, TUNING_STEPS, NUM_KEPT = 3, 120, 16


@dataclass
class Bench:
    """The demo model with what is hardened and what is measured.

    Attributes:
        pipe: the unpruned model.
        mask: what a run pruned.
        prompts: memorized captions, first those that are hardened against.
        usual: calibration captions.
        held_out: captions that utility is measured on.
    """

    pipe: StableDiffusionPipeline
    mask: NeuronMask
    prompts: Sequence[Prompt]
    usual: Sequence[str]
    held_out: Sequence[str]
    settings: AttackSettings = field(default_factory=AttackSettings)

    def __post_init__(self) -> None:
        self.judge = ReplicationJudge(StructuralSimilarity(), known_training_images(self.prompts))
        self.drawing = Drawing("ddim", self.settings.drawing_steps, DEMO.guidance_scale)
        self.sizes = layer_sizes(find_text_projections(self.pipe.unet, "both"))
        self.mask = NeuronMask.from_neurons(self.mask.neurons, self.sizes)

    @property
    def targets(self) -> list[tuple[str, Image.Image]]:
        """What is hardened against: captions and pictures."""
        return [(each.text, self.judge.training.images[each.text]) for each in self.prompts[:NUM_HARDENED]]

    @cached_property
    def hardened(self) -> NeuronMask:
        """The mask after all rounds over value rows."""
        return self.rounds("value")

    @cached_property
    def hardened_both(self) -> NeuronMask:
        """The mask after all rounds over value and key rows."""
        return self.rounds("both")

    def rounds(self, projections: str) -> NeuronMask:
        """Harden the mask."""
        found = harden(
            self.pipe, self.mask, self.targets, self.usual, self.judge, DEMO.guidance_scale, self.settings, ROUNDS,
            SEED, projections,
        )  # fmt: skip
        for turn, each in enumerate(found, start=1):
            told = {"round": turn, "neurons": len(each.neurons), "came back": each.came_back, "silenced": each.silenced}
            print(projections, told, flush=True)
        return NeuronMask.from_neurons(found[-1].neurons, self.sizes)

    def everything(self, projections: str) -> NeuronMask:
        """All rows of a kind."""
        chosen = find_text_projections(self.pipe.unet, projections)
        return NeuronMask({n: torch.full((size,), n in chosen, dtype=torch.bool) for n, size in self.sizes.items()})

    def random(self, mask: NeuronMask) -> NeuronMask:
        """As many random rows as a mask has."""
        return random_rows(self.pipe, changed_rows(self.pipe, self.pruned(mask)), self.usual, SEED)

    def pruned(self, mask: NeuronMask, scale: float = 0.0) -> StableDiffusionPipeline:
        """The model with rows scaled."""
        return pruned_copy(self.pipe, Pruning(mask, scale))

    def tuned(self, pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
        """A model after adversarial fine-tuning; what it may draw instead are the pruned model's images."""
        instead, pruned = [], self.pruned(self.mask)
        for text, _ in self.targets:
            instead.append(draw(pruned, text, self.drawing, [SEED, SEED + 1]))
        return with_unet(
            pipe, adversarially_tuned(pipe, self.targets, instead, self.usual[:NUM_KEPT], TUNING_STEPS, SEED)
        )

    def models(self) -> dict[str, Callable[[], StableDiffusionPipeline]]:
        """Every model of the table, made when it is asked for."""
        memorized = [each.text for each in self.prompts[:NUM_HARDENED]]
        return {
            "base": lambda: self.pipe,
            "mask": lambda: self.pruned(self.mask),
            "mask, rows times -1": lambda: self.pruned(self.mask, -1.0),
            "mask, rows times -2": lambda: self.pruned(self.mask, -2.0),
            "mask, rows times -4": lambda: self.pruned(self.mask, -4.0),
            "Wanda, 1% of the feed-forward weights": lambda: with_unet(self.pipe, wanda_pruned(self.pipe, memorized)),
            "Wanda, 10%": lambda: with_unet(self.pipe, wanda_pruned(self.pipe, memorized, 0.1)),
            "adversarial fine-tuning of the base": lambda: self.tuned(self.pipe),
            "adversarial fine-tuning of the pruned model": lambda: self.tuned(self.pruned(self.mask)),
            "hardened, value rows": lambda: self.pruned(self.hardened),
            "as many random value rows": lambda: self.pruned(self.random(self.hardened)),
            "hardened, value rows times -1": lambda: self.pruned(self.hardened, -1.0),
            "hardened, value and key rows": lambda: self.pruned(self.hardened_both),
            "every key row": lambda: self.pruned(self.everything("key")),
            "every value row": lambda: self.pruned(self.everything("value")),
        }

    def measured(self, candidate: StableDiffusionPipeline) -> dict:
        """Attack share and utility of a model, on seeds that no hardening saw."""
        outcomes = [
            attack(
                candidate, self.judge.training.images[prompt.text], prompt.text, "caption", self.held_out[0],
                self.judge, DEMO.guidance_scale, self.settings, PassCounter(), EVALUATION_SEED + 100 * place,
            )
            for place, prompt in enumerate(self.prompts)
        ]  # fmt: skip
        steps = [each.steps for each in outcomes]
        noise = NoiseJudge(self.pipe, candidate, changed_rows(self.pipe, self.pipe), self.held_out, SEED)
        changes = [mean(noise.change(text).relative_error["candidate"]) for text in self.held_out]
        return {
            "came back": to_json(Rate.of(sum(step is not None for step in steps), len(steps))),
            "came back, hardened against": sum(step is not None for step in steps[:NUM_HARDENED]),
            "came back, others": sum(step is not None for step in steps[NUM_HARDENED:]),
            "steps": steps,
            "highest similarity": [max(each.curve) for each in outcomes],
            "utility loss": mean(changes),
            "images of held-out captions to the base's": median(self._to_base(candidate)),
        }

    def _to_base(self, candidate: StableDiffusionPipeline) -> list[float]:
        """Similarity of images of held-out captions to the base's, same seeds."""
        found = []
        for text in self.held_out[:NUM_DRAWN]:
            ours, theirs = (draw(pipe, text, self.drawing, [SEED, SEED + 1]) for pipe in (self.pipe, candidate))
            compared = self.judge.similarity.compare(*map(self.judge.similarity.describe, (theirs, ours)))
            found += compared.diagonal().tolist()
        return found


def main() -> None:
    """Measure every model, the table growing in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the demo model, with its prompts")
    parser.add_argument("mask", type=Path, help="the mask that the hardening begins with")
    parser.add_argument("--out", type=Path, required=True, help="file of the table")
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.model, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    prompts = read_prompts(arguments.model / PROMPTS_FILE)
    usual, held_out = (
        [prompt.text for prompt in read_prompts(arguments.model / name)] for name in (CALIBRATION_FILE, TEST_FILE)
    )
    bench = Bench(
        pipe,
        NeuronMask.load(arguments.mask),
        [prompts[place] for place in stratified(prompts)][: NUM_HARDENED + NUM_OTHERS],
        usual[:NUM_USUAL],
        held_out[:NUM_UTILITY],
    )
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name, make in bench.models().items():
        if name not in rows:
            candidate = make()
            changed = changed_rows(pipe, candidate)
            rows[name] = {"rows": None if changed.others else changed.mask.num_neurons, **bench.measured(candidate)}
            arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
            print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
