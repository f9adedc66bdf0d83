"""What all parts of a verification share: the two models, the yardstick, the images and the budget."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.errors import OutputError
from nemo_prune.facts import NOT_ASKED
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.json_values import to_json
from nemo_prune.progress import Advance, Listener, Stage
from nemo_prune.proof.changed_rows import ChangedRows, changed_rows
from nemo_prune.proof.copies import CopyDetector, ImageSimilarity, StructuralSimilarity
from nemo_prune.proof.drawing import BASE, CANDIDATE, Drawn, Gallery, captions_at_once, draw_captions
from nemo_prune.proof.evidence import (
    SHARES,
    EvidenceSettings,
)
from nemo_prune.proof.intervals import Rate
from nemo_prune.proof.passes import Ledger, PassCounter
from nemo_prune.proof.regrowth import Regrown
from nemo_prune.proof.replication import (
    BASE_SEEDS,
    ReplicationJudge,
)
from nemo_prune.proof.sampling import stratified
from nemo_prune.proof.training_images import TrainingImages

IMAGES_FOLDER = "images"
TOO_LITTLE = "the budget is too small for it"
_FEWEST_TREATED = 2
_MOST_TREATED = 12
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


def weights_digest(pipe: StableDiffusionPipeline) -> str:
    """sha256 over the weights of U-Net and text encoder, by name."""
    digest = sha256()
    for module in (pipe.unet, pipe.text_encoder):
        for name, value in module.state_dict().items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Bench:
    """What all parts of a verification share.

    Args:
        base: the unpruned model.
        candidate: the model to judge.
        prompts: captions that the base memorizes.
        ordinary: captions that it does not, held out from calibration.
        settings: what is measured, and how much it may cost.
        folder: where results and images are kept.
        listener: hears stages and progress.
        training: the training images that are known.
        drawn: images that were drawn elsewhere, see :class:`~nemo_prune.proof.drawing.Gallery`.

    Attributes:
        pipes: model's name -> model.
        rows: where the two differ.
        judge: compares images.
        counter: counts passes.
        digests: model's name -> sha256 of its weights.
        gallery: draws and keeps images of captions.
        quick: how the images of the other parts are drawn.
        order: the prompts, spread over types and groups.
        passes: part -> what it took.
        seconds: part -> wall time.
        left_out: part -> why it was not measured.
        parts: those that are still to come.
        budget: passes in all.
    """

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
        drawn: Drawn = MappingProxyType({}),
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
        self.judge = ReplicationJudge(similarity, training, settings.thorough)
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
            folder / "images",
            self.pipes,
            settings.drawing,
            self.digests,
            settings.images_per_round,
            settings.seed,
            drawn,
        )
        self.quick = replace(settings.drawing, num_inference_steps=settings.quick_steps)
        self.order = [prompts[position] for position in stratified(prompts)]
        self.passes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.parts = list(settings.parts)
        self.budget = self._remaining = settings.budget if settings.minutes is None else self._passes_of_minutes()

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
    def part(self, name: str) -> Iterator[tuple[int, Ledger, Advance] | None]:
        """What a part may spend, where it keeps its results and whom it tells; None for a part that is left out."""
        if name not in self.parts:
            self.left_out.setdefault(name, NOT_ASKED)
            yield None
            return
        to_come = sum(SHARES[part] for part in self.parts)
        allowance = int(self._remaining * SHARES[name] / to_come)
        ledger = Ledger(self.folder / f"{name}.jsonl", self._depends_on, self.counter)
        began = time.perf_counter()
        with self._listener.stage(_STAGES[name]) as advance:
            yield allowance, ledger, advance
        self.parts.remove(name)
        self._remaining = max(0, self._remaining - ledger.spent)
        self.passes[name] = ledger.spent
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def leave_out(self, name: str, reason: str) -> None:
        """Leave a part out, and say why."""
        if name in self.parts:
            self.parts.remove(name)
            self.left_out[name] = reason

    def target(self, prompt: Prompt) -> Image.Image:
        """A caption's training image or, where none is known, the base's own image."""
        if prompt.text in self.training.images:
            return self.training.images[prompt.text]
        return self.gallery.images(BASE, prompt.text)[0]

    def copies(self, prompt: Prompt, images: Sequence[Image.Image]) -> int:
        """How many images of the first seed are copies, by the caption's training image or the base's other seeds."""
        by_base = self.judge.reference(prompt.text) == BASE_SEEDS
        # The first one has the seed of the images that are judged.
        base = self.gallery.images(BASE, prompt.text)[1:] if by_base else ()
        return sum(self.judge.copied(prompt.text, images, base))

    def treated_prompts(self, allowance: int) -> list[Prompt]:
        """As many prompts as one image each can be afforded of, within limits."""
        number = min(_MOST_TREATED, max(_FEWEST_TREATED, allowance // self.quick.passes))
        return self.order[:number]

    def given_back(self, treatment: str, prompts: Sequence[Prompt]) -> Regrown:
        """What the candidate's present weights give back of some captions, one image each."""
        copies, nearest, seeds = 0, [], [self.settings.seed]
        for group in captions_at_once(prompts, len(seeds)):
            drawn = draw_captions(self.candidate, [prompt.text for prompt in group], self.quick, seeds)
            for prompt, images in zip(group, drawn, strict=True):
                copies += self.copies(prompt, images)
                nearest += self.judge.similarity_to(self.target(prompt), images)
        return Regrown(treatment, Rate.of(copies, len(prompts)), max(nearest))


def _yardstick(settings: EvidenceSettings, device: str) -> ImageSimilarity:
    cut = {} if settings.cut is None else {"cut": settings.cut}
    return StructuralSimilarity(**cut) if settings.sscd is None else CopyDetector(settings.sscd, device=device, **cut)


def _images_digest(training: TrainingImages) -> str:
    digest = sha256()
    for images in (training.images, training.regions):
        for text, image in images.items():
            digest.update(f"{text}\0{image.size}\0".encode() + image.tobytes())
    return digest.hexdigest()
