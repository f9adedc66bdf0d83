"""Masks for a whole corpus, side by side: what they silence, what is gone, what copies, what they cost.

    python -m benchmarks.merging --model demo --out merging.json

One column per way: the paper's union; each prompt on top of those before it; the union without what no prompt needs;
the union thinned; that completed until no image copies, as a run does it; each prompt searched with ordinary captions
preserved; candidates ranked by gradient; gates opened from everything suppressed on; learned gates; as many random
neurons; two yardsticks (rows scaled along; the closed form); everything. Give --model once for each model; the table
has all of them. Images take most of the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from benchmarks.closed_form import edited_weights, replaced_weights
from benchmarks.merging_table import table
from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.attended import attended_moments
from nemo_prune.engine.attribution import costs
from nemo_prune.engine.budget import most_costly_first, thinned, utility_curve
from nemo_prune.engine.by_gradient import localize_by_gradient
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.compensation import Compensation
from nemo_prune.engine.completing import Looks, no_looks
from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.engine.gates import all_neurons, split_by_layer
from nemo_prune.engine.gone import FRESH_SEED, gather_corpus, judge, judge_ordinary
from nemo_prune.engine.holding import hold_harder
from nemo_prune.engine.learned import GateLearner, LearningSettings
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_prompts, not_memorized
from nemo_prune.engine.memo import Memo
from nemo_prune.engine.merge import settle_mask, union_mask
from nemo_prune.engine.ordinary import change_by_timestep, mean_change, walk_ordinary
from nemo_prune.engine.preserve import Preserve, neuron_costs
from nemo_prune.engine.pursuit import PursuitSettings, pursue
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.silence import Silence
from nemo_prune.engine.views import Seeds
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE, demo_folder
from nemo_prune.models.known import DEMO
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.cost import full_mask, matched_random_mask
from nemo_prune.proof.images import Likeness, as_compared, draw_images, image_similarities
from nemo_prune.settings import ABLATIONS, PROJECTIONS, LocalizationSettings, VerificationSettings
from nemo_prune.stages.bar import AFFORDED, FRESH_SEEDS, afforded
from nemo_prune.stages.compensate import usual_moments
from nemo_prune.stages.localize import WEIGHING_PROMPTS
from nemo_prune.stages.pursue import CopyLooks

WAYS = (
    "unpruned", "union", "incremental", "minimal", "thinned", "default", "preserve 1", "ranked", "gradient", "learned",
    "random", "scaled rows", "closed form", "everything",
)  # fmt: skip
# The demo without its terms: harder ground, beside the benchmarks and outside the wheel.
REFERENCE_MODEL = Path(__file__).with_name("reference_model")
# Captions that served no search: the first are looked at, the next walked from noise to image.
WATCHED, WALKED, POINTS, WALK_SEED = 16, 32, 8, 4001


def main() -> None:
    """Measure the models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", action="append", help="`demo`, `reference` or a folder with prompts like the demo's; repeatable"
    )
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--images", type=int, default=4, help="images per caption; 0 draws none")
    parser.add_argument("--ordinary-images", type=int, default=16, help="ordinary captions that images are drawn for")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--projections", choices=PROJECTIONS, default="value", help="whose neurons are searched")
    parser.add_argument("--ablation", choices=ABLATIONS, default="zero", help="what a pruned neuron still gives")
    parser.add_argument("--scales", type=float, nargs="*", default=[], help="the searched masks at these scales, too")
    parser.add_argument("--curves", action="store_true", help="captions gone against change, for the searched masks")
    parser.add_argument("--out", type=Path, help="JSON file for the figures, written as they come")
    arguments = parser.parse_args()
    figures: dict[str, dict] = {}
    for model in arguments.model or ["demo"]:
        figures[model] = {}
        for name, row in Comparison(model, arguments).rows(arguments.ways):
            figures[model][name] = row
            print(name, json.dumps(row), file=sys.stderr, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


@dataclass(frozen=True)
class Way:
    """A way of suppressing.

    Attributes:
        mask: what is suppressed; None where no neurons are named.
        weights: edited weights that do it; None suppresses.
        sample_passes: what finding it cost.
        seconds: likewise.
        rounds: searches that it took, where images are looked at in between.
        scale: what the outputs of the mask's neurons are multiplied by.
        compensation: what stands in for them, where it is not that of all ways.
    """

    mask: NeuronMask | None
    weights: dict[str, Tensor] | None = None
    sample_passes: int = 0
    seconds: float = 0.0
    rounds: int = 1
    scale: float = 0.0
    compensation: Compensation | None = None


class Comparison:
    """All ways on one model."""

    def __init__(self, model: str, arguments: argparse.Namespace) -> None:
        folder = {"demo": demo_folder(), "reference": REFERENCE_MODEL}.get(model, Path(model))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.arguments = arguments
        self.pipe = load_pipeline(folder, device, torch.float32)
        self.predictor = NoisePredictor(self.pipe, LocalizationSettings(projections=arguments.projections))
        self.items = read_prompts(folder / PROMPTS_FILE)
        self.prompts = [item.text for item in self.items]
        self.ordinary = [prompt.text for prompt in read_prompts(folder / CALIBRATION_FILE)]
        self.test = [prompt.text for prompt in read_prompts(folder / TEST_FILE)]
        self.compensation = None
        if arguments.ablation != "zero":
            self.compensation = Compensation(usual_moments(self.predictor, self.ordinary))
            self.predictor.compensation = self.compensation
        if arguments.ablation == "compensated":
            memorized = attended_moments(self.predictor, self.prompts)
            self.compensation = replace(self.compensation, memorized=memorized)
        self.scorer = Scorer(self.predictor)
        self.calibration = calibrate(self.scorer, self.ordinary)
        self.localizer = Localizer(self.scorer, self.calibration, self.calibration.threshold)
        self.training = {item.text: Image.open(item.image) for item in self.items if item.image}
        self.drawing = replace(
            VerificationSettings(),
            images_per_prompt=arguments.images,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=DEMO.guidance_scale,
        )
        # Seeds and captions on which masks are judged served no search.
        seeds = Seeds.draw(self.predictor) + Seeds.draw(self.predictor, FRESH_SEED)
        self.corpus = gather_corpus(
            self.predictor, self.prompts, self.test[:WATCHED], seeds, self.calibration.threshold
        )
        self.states = walk_ordinary(self.predictor, self.test[WATCHED:][:WALKED], POINTS, WALK_SEED)
        self.found: dict[str, Way] = {}

    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, dict]]:
        """Every way's figures, in the order of the table."""
        for name in names:
            passes, began = self.predictor.sample_passes, time.perf_counter()
            way = self.find(name)
            if not way.sample_passes:
                way = replace(
                    way,
                    sample_passes=self.predictor.sample_passes - passes,
                    seconds=time.perf_counter() - began,
                )
            self.found[name] = way
            kept = self.arguments.ablation
            yield name if kept == "zero" or name == "unpruned" else f"{name}, {kept}", self.measure(way)
            for scale in self.arguments.scales if name in ("gradient", "learned") else ():
                yield f"{name}, scale {scale}", self.measure(replace(way, scale=scale))

    def find(self, name: str) -> Way:
        """Search for the mask of a way."""
        sizes = self.predictor.sizes
        if name == "unpruned":
            return Way(NeuronMask.from_neurons([], sizes))
        if name == "union":
            found, passes, seconds = self.localized
            return Way(union_mask(found, sizes), sample_passes=passes, seconds=seconds)
        if name == "incremental":
            return Way(settle_mask(self.localizer, self.one_after_the_other()).mask)
        if name in ("minimal", "thinned"):
            return self.settled(name)
        if name == "default":
            return self.pursued("learned", self.found.get("thinned") or self.find("thinned"))
        if name == "preserve 1":
            preserve = Preserve(neuron_costs(self.predictor, self.ordinary[:WEIGHING_PROMPTS]), 1.0)
            localizer = replace(self.localizer, preserve=preserve)
            return Way(settle_mask(localizer, list(localize_prompts(localizer, self.prompts))).mask)
        if name == "ranked":
            return Way(self.ranked())
        if name in ("gradient", "learned"):
            return self.pursued(name)
        if name == "scaled rows":
            return Way(None, self.scaled_rows())
        if name == "closed form":
            return Way(None, edited_weights(self.predictor, self.prompts, self.ordinary[:128]))
        if name == "random":
            return Way(matched_random_mask(self.matched(), self.calibration.statistics.mean, 0))
        return Way(full_mask(sizes))

    @cached_property
    def localized(self) -> tuple[list[PromptLocalization], int, float]:
        """Every prompt localized for itself, with the sample passes and the seconds that it took."""
        before, began = self.predictor.sample_passes, time.perf_counter()
        found = list(localize_prompts(self.localizer, self.prompts))
        return found, self.predictor.sample_passes - before, time.perf_counter() - began

    def settled(self, name: str) -> Way:
        """The union of the prompts' neurons, thinned or without what no prompt needs."""
        found, passes, seconds = self.localized
        released = self.released()
        before, began = self.predictor.sample_passes, time.perf_counter()
        if name == "thinned":
            states = PursuitSettings().states(released, self.ordinary)
            thin = partial(thinned, released, states, max_utility_loss=AFFORDED)
            as_released = replace(self.localizer, scorer=Scorer(released), memo=Memo())
            mask = settle_mask(self.localizer, found, thin=thin, released=as_released).mask
        else:
            preserve = Preserve(neuron_costs(self.predictor, self.ordinary[:WEIGHING_PROMPTS]), 0.0)
            mask = settle_mask(replace(self.localizer, preserve=preserve), found).mask
        passes += self.predictor.sample_passes + released.sample_passes - before
        return Way(mask, sample_passes=passes, seconds=seconds + time.perf_counter() - began)

    def matched(self) -> NeuronMask:
        """The mask that the random one has as many neurons as."""
        unmatched = ("unpruned", "random", "everything")
        masks = [way.mask for name, way in self.found.items() if name not in unmatched and way.mask is not None]
        return (
            masks[-1]
            if masks
            else NeuronMask.from_neurons(all_neurons(self.predictor.sizes)[::20], self.predictor.sizes)
        )

    def one_after_the_other(self) -> list[PromptLocalization]:
        """Each prompt localized on top of the neurons of those before it; what these silence is left to them."""
        found, neurons = [], frozenset()
        for (detected,) in (self.localizer.detect([text]) for text in self.prompts):
            text, kept = detected.scored.prompt, detected.kept_seeds
            if kept and not Silence(self.localizer, {text: kept}).awake([text], neurons):
                found.append(replace(not_memorized(detected), status="unresolved", kept_seeds=kept))
                continue
            found += localize_prompts(self.localizer, [text], neurons)
            neurons = neurons.union(found[-1].neurons)
        return found

    def ranked(self) -> NeuronMask:
        """The paper's search with candidates by gradient, to the paper's criterion: silent."""
        states = walk_ordinary(self.predictor, self.ordinary[:32], 6, 2001)
        cost = costs(self.predictor, states, range(0, len(states), 6))
        found = list(localize_by_gradient(self.scorer, self.prompts, self.calibration.threshold, cost.values))
        return settle_mask(self.localizer, found).mask

    def pursued(self, search: str, first: Way | None = None) -> Way:
        """The search for what is gone, with the loop over images; from a mask on, if one is given."""
        settings, mask = PursuitSettings(search=search, limits=afforded()), first and first.mask
        released = self.released()
        with TemporaryDirectory() as folder:
            looks: Looks = no_looks
            if self.arguments.images:
                looks = CopyLooks(
                    released, self.items, self.ordinary, self.training, self.drawing, Path(folder) / "looks.jsonl"
                )
            if first is not None and released.is_combining:
                self.hold(released, first.mask, looks)
            result = pursue(
                released, self.prompts, self.ordinary, self.calibration.threshold, settings, looks, first=mask
            )
        passes = (first.sample_passes if first else 0) + released.sample_passes
        mask = result.best.mask if result.rounds else mask
        return Way(mask, sample_passes=passes, rounds=len(result.rounds), compensation=released.compensation)

    def hold(self, released: NoisePredictor, mask: NeuronMask, looks: Looks) -> None:
        """Hold what a mask leaves harder, as a run does."""
        settings = PursuitSettings()
        seeds = Seeds.draw(released) + Seeds.draw(released, settings.seed, FRESH_SEEDS)
        corpus = gather_corpus(self.predictor, self.prompts, self.ordinary[:WATCHED], seeds, self.calibration.threshold)
        states = settings.states(released, self.ordinary)
        hold_harder(released, corpus, states, mask.neurons, afforded(), looks)

    def scaled_rows(self) -> dict[str, Tensor]:
        """Rows scaled from -.5 to 1 instead of zeroed: gates that are learned and never rounded."""
        settings = PursuitSettings()
        seeds = Seeds.draw(self.predictor) + Seeds.draw(self.predictor, settings.seed, settings.more_seeds)
        watched, walked = self.ordinary[: settings.watched], self.ordinary[settings.watched :][: settings.walked]
        corpus = gather_corpus(self.predictor, self.prompts, watched, seeds, self.calibration.threshold)
        states = walk_ordinary(self.predictor, walked, settings.points, settings.seed)
        freely = LearningSettings(most_closed=1.5, rounded_from=2.0, decided_weight=0.0, touched_weight=0.0)
        learner = GateLearner(self.predictor, corpus, states, freely)
        for _ in range(freely.steps):
            learner.take_step()
        factors = split_by_layer(1 - learner.closings, self.predictor.sizes)
        return {
            f"{name}.weight": factors[name][:, None] * layer.weight.detach()
            for name, layer in self.predictor.layers.items()
        }

    def measure(self, way: Way) -> dict:
        """Every row of the table for one way."""
        neurons = way.mask.neurons if way.mask is not None and way.weights is None else ()
        released = self.released(way.scale, way.compensation)
        with replaced_weights(self.predictor, way.weights or {}):
            verdicts = judge(released, self.corpus, neurons)
            ordinary = judge_ordinary(released, self.corpus, neurons)
        with self.applied(way):
            open_gates = torch.ones(sum(self.predictor.sizes.values()), device=self.pipe.unet.device)
            changes = change_by_timestep(self.predictor, self.states, open_gates)
        row = {
            "neurons": way.mask.num_neurons if way.mask is not None else None,
            "per_layer": list(way.mask.counts.values()) if way.mask is not None else None,
            "sample_passes": way.sample_passes,
            "seconds": round(way.seconds, 1),
            "rounds": way.rounds,
            "memorized": len(self.prompts),
            "silent": sum(each.is_silent for each in verdicts),
            "gone": sum(each.is_gone for each in verdicts),
            "not_gone": {each.prompt: each.reasons for each in verdicts if not each.is_gone},
            "called_up": sum(not each.is_gone for each in ordinary),
            "agreement": mean(each.agreement for each in verdicts),
            "change": mean(changes.values()),
            "change_by_timestep": changes,
        }
        if self.arguments.images:
            row |= self.images(way)
        if self.arguments.curves and neurons and len(neurons) < sum(self.predictor.sizes.values()):
            curve = utility_curve(released, self.corpus, self.states, neurons)
            row["curve"] = [(len(point.neurons), point.change, len(point.gone)) for point in curve]
            row["hubs"] = self.hubs(neurons)
        return row

    def hubs(self, neurons: Sequence[Neuron], number: int = 5) -> list[tuple[str, int, float]]:
        """A mask's most costly neurons: layer, index, and what each changes for ordinary captions by itself."""
        costly = most_costly_first(self.predictor, self.states, neurons)[:number]
        return [(each.layer, each.index, mean_change(self.predictor, self.states, [each])) for each in costly]

    @cached_property
    def before(self) -> dict[str, list[Image.Image]]:
        """What the unpruned model draws for the ordinary captions whose images are compared."""
        return self.drawn(self.shown)

    @property
    def shown(self) -> list[str]:
        """Ordinary captions whose images are compared."""
        return self.test[: self.arguments.ordinary_images]

    def drawn(self, prompts: Sequence[str]) -> dict[str, list[Image.Image]]:
        """What the model draws as it is now."""
        return {prompt: draw_images(self.pipe, prompt, self.drawing) for prompt in prompts}

    def images(self, way: Way) -> dict:
        """Copies of any training image on memorized and ordinary captions, and what ordinary images lose."""
        likeness, cut = Likeness([as_compared(each) for each in self.training.values()]), self.drawing.replication_cut
        shown, before = self.shown, self.before
        with self.applied(way):
            after = self.drawn([*self.prompts, *shown])
        copied = {
            prompt: float((likeness.nearest([as_compared(each) for each in images])[0] >= cut).float().mean())
            for prompt, images in after.items()
        }
        same = [1 - float(image_similarities(before[each], after[each]).diagonal().mean()) for each in shown]
        found = {
            "copies_memorized": mean(copied[prompt] for prompt in self.prompts),
            "captions_that_copy": [prompt for prompt in self.prompts if copied[prompt]],
            "copies_ordinary": mean(copied[prompt] for prompt in shown),
            "image_change": mean(same),
        }
        if self.drawing.images_per_prompt == 1:
            return found
        return found | {
            "image_change_two_seeds": mean(_diversity(before[prompt]) for prompt in shown),
            "diversity_memorized": mean(_diversity(after[prompt]) for prompt in self.prompts),
            "diversity_ordinary": mean(_diversity(after[prompt]) for prompt in shown),
        }

    def released(self, scale: float = 0.0, compensation: Compensation | None = None) -> NoisePredictor:
        """The model; what it suppresses is multiplied or stood in for, as a release does."""
        return NoisePredictor(self.pipe, self.predictor.settings, None, scale, compensation or self.compensation)

    def applied(self, way: Way) -> AbstractContextManager:
        """The way's model while the context lasts."""
        if way.weights:
            return replaced_weights(self.predictor, way.weights)
        if way.mask is None:
            return nullcontext()
        released = self.released(way.scale, way.compensation)
        return apply_mask(self.pipe, released.in_weights(way.mask), way.scale)


def _diversity(images: Sequence[Image.Image]) -> float:
    """How much a caption's images differ: 1 - SSIM of neighbouring seeds."""
    return 1 - float(image_similarities(images, [*images[1:], images[0]]).diagonal().mean())


if __name__ == "__main__":
    main()
