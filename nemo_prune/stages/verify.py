"""Gather the evidence on a candidate within a budget: `nemo-prune verify`, and the last stage of a run."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.errors import OutputError, PromptError
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.json_values import to_json
from nemo_prune.files.work import write_atomically
from nemo_prune.mask import Neuron
from nemo_prune.progress import Advance, Listener, Stage
from nemo_prune.proof.attack import AttackRun, attack, summarize_attacks, work_ratio
from nemo_prune.proof.changed_rows import ChangedRows, changed_rows
from nemo_prune.proof.copies import CopyDetector, ImageSimilarity, StructuralSimilarity
from nemo_prune.proof.drawing import BASE, CANDIDATE, Gallery, draw
from nemo_prune.proof.evidence import (
    SHARES,
    Changes,
    Evidence,
    EvidenceSettings,
    EvidenceSummary,
    ModelFacts,
    OrdinaryControl,
    RecallSummary,
    WorkRatio,
)
from nemo_prune.proof.image_networks import Alignment, distances, image_features
from nemo_prune.proof.intervals import Equivalence, Rate, Spread
from nemo_prune.proof.membership import PictureLoss, area_under_curve, passes_per_picture, picture_loss
from nemo_prune.proof.passes import Ledger, PassCounter
from nemo_prune.proof.recall_matrix import RecallMatrix, RecallRow, recall_row
from nemo_prune.proof.regrowth import Regrown, Tuner, merge_base, round_weights, treated
from nemo_prune.proof.replication import (
    BASE_SEEDS,
    CaptionReplication,
    ReplicationJudge,
    measure_replication,
    summarize_replication,
)
from nemo_prune.proof.roots import FILLINGS, STRETCHED, FoundRows, fill_rows, found_rows, rows_that_stand_out
from nemo_prune.proof.sampling import stratified
from nemo_prune.proof.tokens import TokenActivations, token_activations
from nemo_prune.proof.training_images import TrainingImages, known_training_images
from nemo_prune.proof.utility import (
    RANDOM,
    CaptionChange,
    CaptionImages,
    NoiseChange,
    NoiseJudge,
    Utility,
    caption_images,
    denoising_equivalence,
    neighbours,
)
from nemo_prune.proof.variants import VariantImages, VariantResult, ways_to_ask

EVIDENCE_FILE = "evidence.json"
_STAGES = {
    "replication": Stage.REPLICATION,
    "utility": Stage.UTILITY,
    "attack": Stage.ATTACK,
    "membership": Stage.MEMBERSHIP,
    "variants": Stage.VARIANTS,
    "roots": Stage.ROOTS,
    "regrowth": Stage.REGROWTH,
    "recall": Stage.RECALL,
}
_FEWEST_TREATED = 2
_MOST_TREATED = 12
_MOST_RECALLED = 12
_TOO_LITTLE = "the budget is too small for it"


def gather_evidence(
    base: StableDiffusionPipeline,
    candidate: StableDiffusionPipeline,
    prompts: Sequence[Prompt],
    ordinary: Sequence[str],
    settings: EvidenceSettings,
    folder: Path,
    listener: Listener = Listener(),
    *,
    names: tuple[str, str] = ("the base", "the candidate"),
    neurons: Mapping[str, Sequence[Neuron]] | None = None,
    training: TrainingImages | None = None,
) -> Evidence:
    """Measure what a candidate still gives back and what it still can do, beside its base.

    The candidate may be any model of the base's architecture. What is measured is kept in the folder, so that a call
    that was stopped goes on where it was; with a larger budget it goes on from there, too.

    Args:
        base: the unpruned model; its weights are given back as they were.
        candidate: the model to judge; the same.
        prompts: captions that the base memorizes.
        ordinary: captions that it does not, held out from calibration.
        settings: what is measured, and how much it may cost.
        folder: where results and images are kept, never for publication.
        listener: hears stages and progress.
        names: what to call the two; never a path.
        neurons: caption -> its own neurons, for the recall matrix.
        training: the training images, where the caller has opened them.

    Raises:
        NemoPruneError: the models can't be compared, there are no captions, or the folder can't be used.
    """
    if not prompts or not ordinary:
        raise PromptError("Evidence needs captions that the base memorizes, and ordinary ones that it does not.")
    training = known_training_images(prompts) if training is None else training
    gathering = _Gathering(base, candidate, prompts, ordinary, settings, folder, listener, training)
    evidence = gathering.gather(names, neurons or {})
    write_atomically(folder / EVIDENCE_FILE, json.dumps(evidence.to_json(), indent=2))
    return evidence


def weights_digest(pipe: StableDiffusionPipeline) -> str:
    """sha256 over the weights of U-Net and text encoder, by name."""
    digest = sha256()
    for module in (pipe.unet, pipe.text_encoder):
        for name, value in module.state_dict().items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class _Gathering:
    """One gathering: what its parts share, and a method for each part."""

    def __init__(
        self,
        base: StableDiffusionPipeline,
        candidate: StableDiffusionPipeline,
        prompts: Sequence[Prompt],
        ordinary: Sequence[str],
        settings: EvidenceSettings,
        folder: Path,
        listener: Listener,
        training: TrainingImages,
    ) -> None:
        self.base, self.candidate = base, candidate
        self.pipes = {BASE: base, CANDIDATE: candidate}
        self.prompts, self.ordinary, self.training = prompts, list(ordinary), training
        self.settings, self.folder, self._listener = settings, folder, listener
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {folder} can't be used: {error}") from error
        self.rows: ChangedRows = changed_rows(base, candidate)
        similarity = _yardstick(settings, base.unet.device.type)
        self.judge = ReplicationJudge(similarity, training)
        self.counter = PassCounter()
        self.digests = {name: weights_digest(pipe) for name, pipe in self.pipes.items()}
        self._depends_on = {
            **self.digests,
            **settings.identity(),
            "yardstick": to_json(similarity.yardstick),
            "prompts": text_hash([prompt.text for prompt in prompts]),
            "ordinary": text_hash(self.ordinary),
            "training images": _images_digest(training),
        }
        self.gallery = Gallery(
            folder / "images", self.pipes, settings.drawing, self.digests, settings.images_per_round, settings.seed
        )
        self.quick = replace(settings.drawing, num_inference_steps=settings.quick_steps)
        self.order = [prompts[position] for position in stratified(prompts)]
        self.passes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self._parts = list(settings.parts)
        self.budget = self._remaining = settings.budget if settings.minutes is None else self._passes_of_minutes()

    def gather(self, names: tuple[str, str], neurons: Mapping[str, Sequence[Neuron]]) -> Evidence:
        """Measure part after part and bring them together."""
        if not neurons or not self.training.images:
            self._leave_out("recall", "the prompts' own masks or training images are not known")
        if not self.training.images:
            self._leave_out("membership", "no training image is known")
        with self.counter.counting(self.base.unet, self.candidate.unet):
            captions = self._replication()
            utility, control = self._utility()
            runs = self._attack()
            membership = self._membership()
            variants = self._variants()
            roots, refilled = self._roots()
            regrown = self._regrowth()
            recall = self._recall(neurons)
        results = summarize_attacks(runs, self.settings.attack)
        ratios = {name: work_ratio(results, name) for name in self.pipes}
        summary = EvidenceSummary(
            base=ModelFacts(names[0], self.digests[BASE]),
            candidate=ModelFacts(names[1], self.digests[CANDIDATE]),
            changes=Changes({k: v for k, v in self.rows.mask.counts.items() if v}, self.rows.others),
            yardstick=self.judge.similarity.yardstick,
            drawing=self.settings.drawing,
            seed=self.settings.seed,
            images_per_round=self.settings.images_per_round,
            replication=summarize_replication(
                captions,
                self.prompts,
                self.judge.cut,
                control.parts_cut if control else None,
                len(self.training.not_available),
                self.settings.most_rounds,
            ),
            control=control,
            utility=utility,
            attacks=tuple(results),
            work_ratios=tuple(WorkRatio(name, *found) for name, found in ratios.items() if found),
            membership=membership,
            variants=tuple(variants),
            roots=roots,
            refilled=tuple(refilled),
            regrown=tuple(regrown),
            tokens=self._tokens(),
            recall=_recall_summary(recall, self.training),
            left_out=self.left_out,
            budget=self.budget,
            passes=self.passes,
            seconds=self.seconds,
        )
        return Evidence(summary, tuple(captions), tuple(runs), recall, dict(self.training.not_available))

    # --- the budget ---

    def _passes_of_minutes(self) -> int:
        """How many passes the minutes of the settings are, by a measured batch; the same again when resumed."""
        size = self.base.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        embeds = torch.zeros(8, 77, self.base.unet.config.cross_attention_dim)
        latents = torch.zeros(8, self.base.unet.config.in_channels, height, width)
        place = {"device": self.base.unet.device, "dtype": self.base.unet.dtype}

        def timed() -> float:
            with torch.no_grad():
                for turn in range(2):
                    # The first one warms up.
                    began = time.perf_counter() if turn else 0.0
                    self.base.unet(
                        latents.to(**place), 500, encoder_hidden_states=embeds.to(**place)
                    ).sample.sum().item()
            return (time.perf_counter() - began) / len(latents)

        speed = Ledger(self.folder / "speed.jsonl", self._depends_on, self.counter).once("speed", float, timed)
        return max(1, int(60 * self.settings.minutes / speed))

    @contextmanager
    def _part(self, name: str) -> Iterator[tuple[int, Ledger, Advance] | None]:
        """What a part may spend, where it keeps its results and whom it tells; None for a part that is left out."""
        if name not in self._parts:
            self.left_out.setdefault(name, "it was not asked for")
            yield None
            return
        to_come = sum(SHARES[part] for part in self._parts)
        allowance = int(self._remaining * SHARES[name] / to_come)
        ledger = Ledger(self.folder / f"{name}.jsonl", self._depends_on, self.counter)
        began = time.perf_counter()
        with self._listener.stage(_STAGES[name]) as advance:
            yield allowance, ledger, advance
        self._parts.remove(name)
        self._remaining = max(0, self._remaining - ledger.spent)
        self.passes[name] = ledger.spent
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def _leave_out(self, name: str, reason: str) -> None:
        if name in self._parts:
            self._parts.remove(name)
            self.left_out[name] = reason

    # --- the parts ---

    def _replication(self) -> list[CaptionReplication]:
        if "replication" not in self._parts:
            self._parts.insert(0, "replication")
        with self._part("replication") as (allowance, ledger, advance):
            settings = self.settings
            return measure_replication(
                self.gallery, self.judge, self.prompts, allowance, ledger, settings.bound, settings.most_rounds, advance
            )

    def _utility(self) -> tuple[Utility | None, OrdinaryControl | None]:
        with self._part("utility") as given:
            if given is None:
                return None, None
            allowance, ledger, advance = given
            near = neighbours(self.ordinary, [prompt.text for prompt in self.prompts], self.settings.utility_captions)
            apart = [text for text in self.ordinary if text not in near]
            held_out = (apart or self.ordinary)[: self.settings.utility_captions]
            noise = NoiseJudge(self.base, self.candidate, self.rows, self.ordinary, self.settings.seed)
            others = [unet for unet in noise.unets if unet not in (self.base.unet, self.candidate.unet)]
            number = max(2, min(len(held_out), allowance // (4 * noise.passes)))
            held_out, near = held_out[:number], near[:number]
            image_cost = (2 + (noise.random is not None)) * self.gallery.passes_per_round
            drawn = held_out[: max(1, (allowance - (len(held_out) + len(near)) * noise.passes) // image_cost)]
            total = len(held_out) + len(near) + len(drawn)
            changes: dict[str, CaptionChange] = {}
            with self.counter.counting(*others):
                for text in held_out + near:
                    changes[text] = ledger.once(f"noise: {text}", CaptionChange, lambda text=text: noise.change(text))
                    advance(len(changes), total)
            images = []
            self.gallery.lend(RANDOM, self.base)
            for text in drawn:

                def work(text: str = text) -> CaptionImages:
                    return caption_images(self.gallery, self.base, noise.random, self.judge, text)

                images.append(ledger.once(f"images: {text}", CaptionImages, work))
                advance(len(changes) + len(images), total)
            return self._utility_of(held_out, near, drawn, changes, images, noise), self._control(images)

    def _utility_of(
        self,
        held_out: Sequence[str],
        near: Sequence[str],
        drawn: Sequence[str],
        changes: Mapping[str, CaptionChange],
        images: Sequence[CaptionImages],
        noise: NoiseJudge,
    ) -> Utility:
        held = NoiseChange.of([changes[text] for text in held_out], noise.timesteps)
        alignment, aligned = self._alignment(drawn)
        return Utility(
            held_out=held,
            neighbours=NoiseChange.of([changes[text] for text in near], noise.timesteps),
            loss=held.loss(),
            equivalence=denoising_equivalence([changes[text] for text in held_out], self.settings.margin),
            images_to_base=Spread.of([value for each in images for value in each.to_base]),
            images_random=Spread.of([value for each in images for value in each.random_to_base]),
            images_between_seeds=Spread.of([value for each in images for value in each.between_seeds]),
            alignment=alignment,
            alignment_equivalence=aligned,
            distances=self._distances(drawn),
        )

    def _alignment(self, texts: Sequence[str]) -> tuple[dict[str, Spread] | None, Equivalence | None]:
        if self.settings.clip is None:
            return None, None
        clip = Alignment(self.settings.clip, self.base.unet.device.type)
        found = {name: [clip(text, self.gallery.images(name, text)) for text in texts] for name in self.pipes}
        differences = [
            sum(theirs) / len(theirs) - sum(ours) / len(ours)
            for ours, theirs in zip(found[BASE], found[CANDIDATE], strict=True)
        ]
        spreads = {name: Spread.of([value for each in values for value in each]) for name, values in found.items()}
        margin = self.settings.margin * abs(spreads[BASE].median)
        return spreads, Equivalence.of("cosine of caption and image (CLIP)", differences, margin)

    def _distances(self, texts: Sequence[str]) -> Mapping[str, float] | None:
        if self.settings.features is None:
            return None
        described = [
            image_features(self.settings.features, [each for text in texts for each in self.gallery.images(name, text)])
            for name in self.pipes
        ]
        return distances(*described)

    def _control(self, images: Sequence[CaptionImages]) -> OrdinaryControl | None:
        if not self.training.images:
            return None
        near = [value >= self.judge.cut for each in images for value in each.nearest_of_base]
        parts = [value for each in images for value in each.parts_of_base]
        return OrdinaryControl(Rate.of(sum(near), len(near)), max(self.judge.cut, *parts))

    def _attack(self) -> list[AttackRun]:
        with self._part("attack") as given:
            if given is None:
                return []
            allowance, ledger, advance = given
            cost = self.settings.attack.passes(self.settings.drawing.guidance_scale)
            if allowance < cost:
                self.left_out["attack"] = _TOO_LITTLE
                return []
            runs = []
            for model, start, memorized, prompt, place in _attacks(self.order):
                if ledger.spent + cost > allowance and not ledger.knows(_attack_key(model, start, memorized, prompt)):
                    continue
                work = self._attack_run(model, start, memorized, prompt, self.settings.seed + 1000 * place)
                runs.append(ledger.once(_attack_key(model, start, memorized, prompt), AttackRun, work))
                advance(min(ledger.spent, allowance), allowance)
            return runs

    def _attack_run(
        self, model: str, start: str, memorized: bool, prompt: Prompt, seed: int
    ) -> Callable[[], AttackRun]:
        def work() -> AttackRun:
            target = self._target(prompt)
            target = target if memorized else self.judge.never_trained_on(target)
            found = attack(
                self.pipes[model], target, prompt.text, start, self.ordinary[0], self.judge,
                self.settings.drawing.guidance_scale, self.settings.attack, self.counter, seed,
            )  # fmt: skip
            return AttackRun(model, memorized, start, found.steps, max(found.curve), found.curve)

        return work

    def _target(self, prompt: Prompt) -> Image.Image:
        """A caption's training image or, where none is known, the base's own image."""
        if prompt.text in self.training.images:
            return self.training.images[prompt.text]
        return self.gallery.images(BASE, prompt.text)[0]

    def _membership(self) -> dict[str, float]:
        with self._part("membership") as given:
            if given is None:
                return {}
            allowance, ledger, advance = given
            known = [prompt for prompt in self.order if prompt.text in self.training.images]
            known = known[: max(2, allowance // (2 * len(self.pipes) * passes_per_picture()))]
            losses: dict[str, list[PictureLoss]] = {name: [] for name in self.pipes}
            for done, prompt in enumerate(known, start=1):
                for name, pipe in self.pipes.items():

                    def work(pipe: StableDiffusionPipeline = pipe, prompt: Prompt = prompt) -> PictureLoss:
                        picture = self.training.images[prompt.text]
                        control = self.judge.never_trained_on(picture)
                        return PictureLoss(
                            *(picture_loss(pipe, prompt.text, each, self.settings.seed) for each in (picture, control))
                        )

                    losses[name].append(ledger.once(f"{name}: {prompt.text}", PictureLoss, work))
                advance(done, len(known))
            return {name: area_under_curve(each) for name, each in losses.items() if each}

    def _variants(self) -> list[VariantResult]:
        with self._part("variants") as given:
            if given is None:
                return []
            allowance, ledger, advance = given
            ways = ways_to_ask(self.quick, self.ordinary, self.judge.never_trained_on, self.settings.seed)
            found: dict[str, list[VariantImages]] = {}
            cost = 2 * self.quick.passes
            for prompt in self.order:
                # All ways or none, so that every way has the same captions; image to image costs less than its share.
                if (
                    found
                    and ledger.spent + cost * len(ways) > allowance
                    and not ledger.knows(_way_key(ways[-1], prompt))
                ):
                    break
                for way in ways:

                    def work(way=way, prompt: Prompt = prompt) -> VariantImages:
                        return self._asked(way, prompt)

                    found.setdefault(way.name, []).append(ledger.once(_way_key(way, prompt), VariantImages, work))
                    advance(min(ledger.spent, allowance), allowance)
            return [VariantResult.of(name, each) for name, each in found.items()]

    def _asked(self, way, prompt: Prompt) -> VariantImages:
        target = self._target(prompt)
        copies = {}
        for name, pipe in self.pipes.items():
            images = way.draw(pipe, prompt.text, target, [self.settings.seed])
            if way.of_control:
                found = self.judge.similarity_to(self.judge.never_trained_on(target), images)
                copies[name] = sum(value >= self.judge.cut for value in found)
            else:
                copies[name] = self._copies(prompt, images)
        return VariantImages(copies[BASE], copies[CANDIDATE], len(images))

    def _copies(self, prompt: Prompt, images: Sequence[Image.Image]) -> int:
        by_base = self.judge.reference(prompt.text) == BASE_SEEDS
        # The first one has the seed of the images that are judged.
        base = self.gallery.images(BASE, prompt.text)[1:] if by_base else ()
        return sum(self.judge.copied(prompt.text, images, base))

    def _roots(self) -> tuple[FoundRows | None, list[Regrown]]:
        with self._part("roots") as given:
            if given is None:
                return None, []
            allowance, ledger, advance = given
            changed = None if self.rows.others else self.rows.mask
            found = found_rows(self.candidate.unet, self.base.unet, changed)
            zeroed, small = rows_that_stand_out(self.candidate.unet)
            tries = [(filling, zeroed) for filling in FILLINGS] if zeroed.num_neurons else []
            tries += [(STRETCHED, small)] if small.num_neurons else []
            prompts = self._treated_prompts(allowance // max(1, len(tries)))
            refilled = []
            for filling, rows in tries:

                def work(filling=filling, rows=rows) -> Regrown:
                    with treated(self.candidate):
                        fill_rows(self.candidate.unet, rows, filling, self.settings.seed)
                        return self._given_back(f"filled with {filling}", prompts)

                refilled.append(ledger.once(f"{filling} {len(prompts)}", Regrown, work))
                advance(len(refilled), len(tries))
            return found, refilled

    def _regrowth(self) -> list[Regrown]:
        with self._part("regrowth") as given:
            if given is None:
                return []
            allowance, ledger, advance = given
            tuning = self.settings.fine_tuning
            steps = list(tuning.steps)
            while steps and tuning.passes(steps[-1]) > allowance / 2:
                steps.pop()
            if len(steps) < len(tuning.steps):
                self.left_out[f"fine-tuning of {tuning.steps[-1]} steps"] = _TOO_LITTLE
            rest = allowance - (tuning.passes(steps[-1]) if steps else 0)
            treatments = {
                f"{share:.0%} of the base merged in": lambda unet, share=share: merge_base(unet, self.base.unet, share)
                for share in (0.25, 0.5, 0.75)
            } | {
                f"rounded to {each}": lambda unet, each=each: round_weights(unet, each) for each in ("float16", "int8")
            }
            total = len(treatments) + len(steps)
            prompts = self._treated_prompts(rest // total)
            found = []
            for name, treat in treatments.items():

                def work(name: str = name, treat: Callable = treat) -> Regrown:
                    with treated(self.candidate):
                        treat(self.candidate.unet)
                        return self._given_back(name, prompts)

                found.append(ledger.once(f"{name} {len(prompts)}", Regrown, work))
                advance(len(found), total)
            return found + self._fine_tuned(steps, prompts, ledger)

    def _fine_tuned(self, steps: Sequence[int], prompts: Sequence[Prompt], ledger: Ledger) -> list[Regrown]:
        """The candidate after each of these numbers of steps; all of them are one result, for they build on another."""
        if not steps:
            return []

        def work() -> list[Regrown]:
            found = []
            with treated(self.candidate):
                tuner = Tuner(
                    self.candidate,
                    self.base,
                    self.ordinary,
                    self.settings.fine_tuning,
                    self.counter,
                    self.settings.seed,
                )
                for step in range(1, steps[-1] + 1):
                    tuner.step()
                    if step in steps:
                        tuner.copy_weights_to(self.candidate.unet)
                        found.append(self._given_back(f"{step} steps of fine-tuning", prompts))
            return found

        try:
            return ledger.once(f"fine-tuning {list(steps)} {len(prompts)}", list[Regrown], work)
        except torch.OutOfMemoryError:
            self.left_out["fine-tuning"] = "the device's memory does not take the gradients of all weights"
            return []

    def _treated_prompts(self, allowance: int) -> list[Prompt]:
        number = min(_MOST_TREATED, max(_FEWEST_TREATED, allowance // self.quick.passes))
        return self.order[:number]

    def _given_back(self, treatment: str, prompts: Sequence[Prompt]) -> Regrown:
        """What the candidate's present weights give back of some captions, one image each."""
        copies, nearest = 0, []
        for prompt in prompts:
            images = draw(self.candidate, prompt.text, self.quick, [self.settings.seed])
            copies += self._copies(prompt, images)
            nearest += self.judge.similarity_to(self._target(prompt), images)
        return Regrown(treatment, Rate.of(copies, len(prompts)), max(nearest))

    def _tokens(self) -> TokenActivations | None:
        if not self.rows.are_a_mask:
            return None
        memorized = [prompt.text for prompt in self.order[:64]]
        return token_activations(self.base, self.rows.mask, memorized, self.ordinary[:64])

    def _recall(self, neurons: Mapping[str, Sequence[Neuron]]) -> RecallMatrix | None:
        with self._part("recall") as given:
            if given is None:
                return None
            allowance, ledger, advance = given
            known = [each.text for each in self.order if each.text in self.training.images and neurons.get(each.text)]
            number = min(_MOST_RECALLED, len(known), int((allowance / self.quick.passes) ** 0.5))
            if number < 2:
                self.left_out["recall"] = _TOO_LITTLE
                return None
            captions = known[:number]

            def row(text: str | None) -> RecallRow:
                own = neurons[text] if text else ()
                return recall_row(self.base, own, captions, self.judge, self.quick, self.settings.seed)

            rows = {}
            before = ledger.once(f"nothing {number}", RecallRow, lambda: row(None))
            for text in captions:
                rows[text] = ledger.once(f"{number} {text}", RecallRow, lambda text=text: row(text))
                advance(len(rows), number)
            return RecallMatrix(tuple(captions), rows, before)


def _yardstick(settings: EvidenceSettings, device: str) -> ImageSimilarity:
    cut = {} if settings.cut is None else {"cut": settings.cut}
    return StructuralSimilarity(**cut) if settings.sscd is None else CopyDetector(settings.sscd, device=device, **cut)


def _images_digest(training: TrainingImages) -> str:
    digest = sha256()
    for images in (training.images, training.regions):
        for text, image in images.items():
            digest.update(f"{text}\0{image.size}\0".encode() + image.tobytes())
    return digest.hexdigest()


def _attacks(order: Sequence[Prompt]) -> Iterator[tuple[str, str, bool, Prompt, int]]:
    """The attacks in the order of what they tell: model, start, whether the target is memorized, caption, its place.

    A control hardly ever comes back, so it takes all steps: there are fewer of them than of memorized pictures.
    """
    for first in range(0, len(order), 4):
        block = list(enumerate(order))[first : first + 4]
        for place, prompt in block:
            yield CANDIDATE, "caption", True, prompt, place
            if place == first:
                yield CANDIDATE, "caption", False, prompt, place
            yield BASE, "caption", True, prompt, place
        for model, (place, prompt) in zip((BASE, CANDIDATE), block[::2], strict=False):
            yield model, "caption", False, prompt, place
        for place, prompt in block[::2]:
            for start in ("noise", "ordinary caption"):
                yield CANDIDATE, start, True, prompt, place
                if place == first:
                    yield CANDIDATE, start, False, prompt, place


def _attack_key(model: str, start: str, memorized: bool, prompt: Prompt) -> str:
    return f"{model}, {start}, {'memorized' if memorized else 'control'}: {prompt.text}"


def _way_key(way, prompt: Prompt) -> str:
    return f"{way.name}: {prompt.text}"


def _recall_summary(recall: RecallMatrix | None, training: TrainingImages) -> RecallSummary | None:
    if recall is None:
        return None
    own = {text: place for place, text in enumerate(training.images)}
    return RecallSummary(len(recall.rows), len(recall.rows) * len(recall.captions), recall.awakened(own))
