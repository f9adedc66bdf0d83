"""How images are drawn when two models are compared: the same seeds, the same scheduler, each image once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from torch import Tensor

from nemo_prune.engine.diffusion import draw_latents
from nemo_prune.engine.memory import with_less_at_once
from nemo_prune.errors import SettingsError
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.images import ImageFolder
from nemo_prune.files.json_values import to_json
from nemo_prune.settings import VerificationSettings

_SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "pndm": PNDMScheduler,
}
SCHEDULERS = tuple(_SCHEDULERS)
# Images that are drawn at once; by guidance a batch of the U-Net is twice as large.
_IMAGES_AT_ONCE = 20
BASE, CANDIDATE = "base", "candidate"
Caption = TypeVar("Caption")
Drawn = Mapping[str, Mapping[str, Sequence[Image.Image]]]


@dataclass(frozen=True)
class Drawing:
    """How an image is drawn.

    Attributes:
        scheduler: ``ddim`` as the released code, ``euler``, ``dpm`` or ``pndm``, on the checkpoint's own schedule.
        num_inference_steps: its steps.
        guidance_scale: classifier-free guidance; at 1 or less there is none.
    """

    scheduler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 7.0

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise SettingsError(f"`scheduler` is {self.scheduler}, expected: {' or '.join(SCHEDULERS)}.")
        if self.num_inference_steps < 1:
            raise SettingsError(f"`num_inference_steps` is {self.num_inference_steps}, expected: at least 1.")

    @classmethod
    def of(cls, verification: VerificationSettings) -> "Drawing":
        """How a run draws: as the released code, by DDIM."""
        return cls("ddim", verification.num_inference_steps, verification.guidance_scale)

    @property
    def passes(self) -> int:
        """Passes that one image costs."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)


@contextmanager
def scheduled(pipe: StableDiffusionPipeline, name: str) -> Iterator[None]:
    """Give a pipeline another scheduler on its own schedule while the context lasts."""
    own = pipe.scheduler
    try:
        # Without Runge-Kutta steps at the beginning, as Stable Diffusion has it; the other schedulers don't know them.
        more = {"skip_prk_steps": True} if name == "pndm" else {}
        pipe.scheduler = _SCHEDULERS[name].from_config(own.config, **more)
        yield
    finally:
        pipe.scheduler = own


def seeded_latents(pipe: StableDiffusionPipeline, seeds: Sequence[int]) -> Tensor:
    """Initial latents [seeds, channels, height, width], each by its own generator: further seeds change none."""
    return torch.cat([draw_latents(pipe.unet, 1, seed) for seed in seeds])


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline, prompt: str | Tensor, drawing: Drawing, seeds: Sequence[int]
) -> list[Image.Image]:
    """Draw one image per seed.

    Args:
        pipe: the model.
        prompt: a caption, or its embedding [positions, width].
        drawing: how.
        seeds: of the initial latents.

    Raises:
        ModelError: the device's memory does not take a single image.
    """
    with scheduled(pipe, drawing.scheduler):
        return draw_from(pipe, prompt, seeded_latents(pipe, seeds), drawing.num_inference_steps, drawing.guidance_scale)


def draw_captions(
    pipe: StableDiffusionPipeline, captions: Sequence[str], drawing: Drawing, seeds: Sequence[int]
) -> list[list[Image.Image]]:
    """Draw the images of several captions at once, one per caption and seed.

    Args:
        pipe: the model.
        captions: see :func:`captions_at_once` for how many fill a batch.
        drawing: how.
        seeds: of the initial latents, the same for every caption.

    Raises:
        ModelError: the device's memory does not take a single image.
    """
    with scheduled(pipe, drawing.scheduler):
        images = draw_from(
            pipe,
            [caption for caption in captions for _ in seeds],
            seeded_latents(pipe, seeds).repeat(len(captions), 1, 1, 1),
            drawing.num_inference_steps,
            drawing.guidance_scale,
        )
    return [images[start : start + len(seeds)] for start in range(0, len(images), len(seeds))]


def captions_at_once(captions: Sequence[Caption], images_per_caption: int) -> list[Sequence[Caption]]:
    """Captions in groups whose images fill a batch; the groups depend on nothing else, as the images' last bits do."""
    size = max(1, _IMAGES_AT_ONCE // images_per_caption)
    return [captions[start : start + size] for start in range(0, len(captions), size)]


@torch.no_grad()
def draw_from(
    pipe: StableDiffusionPipeline,
    prompt: str | Sequence[str] | Tensor,
    latents: Tensor,
    num_inference_steps: int,
    guidance_scale: float | None,
) -> list[Image.Image]:
    """Draw one image per initial latent, by the pipeline's present scheduler.

    They are decoded one by one, which takes little memory; where it is short, fewer are drawn at once.

    Args:
        pipe: the model.
        prompt: a caption, one for each image, or one's embedding [positions, width].
        latents: [images, channels, height, width].
        num_inference_steps: steps of the scheduler.
        guidance_scale: classifier-free guidance.

    Raises:
        ModelError: the device's memory does not take a single image.
    """

    asked = [prompt] * len(latents) if isinstance(prompt, str | Tensor) else prompt

    pipe.vae.enable_slicing()

    def drawn(at_once: int) -> list[Image.Image]:
        images = []
        for start in range(0, len(latents), at_once):
            part = latents[start : start + at_once]
            images += pipe(
                **_asked(pipe, asked[start : start + at_once]),
                latents=part.to(pipe.unet.device, pipe.unet.dtype),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).images
        return images

    return with_less_at_once(drawn, len(latents), "drawing one image")[0]


def _asked(pipe: StableDiffusionPipeline, prompts: Sequence[str] | Sequence[Tensor]) -> dict:
    """What a pipeline is asked for."""
    if isinstance(prompts[0], str):
        return {"prompt": list(prompts)}
    embeds = torch.stack(list(prompts)).to(pipe.unet.dtype)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": _empty(pipe).expand(len(prompts), -1, -1)}


class Gallery:
    """The images of both models, each drawn once and kept without loss.

    Args:
        folder: where they are kept.
        pipes: model's name -> model.
        drawing: how they are drawn.
        depends_on: what else they depend on, as JSON values, such as digests of the models.
        images_per_round: images that are drawn at once.
        seed: of the first image; the others follow.
        drawn: model's name -> caption -> images of a first round that were drawn elsewhere in just this way.
    """

    def __init__(
        self,
        folder: Path,
        pipes: Mapping[str, StableDiffusionPipeline],
        drawing: Drawing,
        depends_on: dict,
        images_per_round: int,
        seed: int,
        drawn: Drawn = MappingProxyType({}),
    ) -> None:
        self.drawing, self.images_per_round = drawing, images_per_round
        self._pipes, self._seed = dict(pipes), seed
        self._together: dict[str, Sequence[str]] = {}
        self._drawn = {
            (model, text): images
            for model, of_texts in drawn.items()
            for text, images in of_texts.items()
            if len(images) == images_per_round
        }
        identity = {**depends_on, **to_json(drawing), "images per round": images_per_round, "seed": seed}
        self._folder = ImageFolder(folder, identity)

    def lend(self, model: str, pipe: StableDiffusionPipeline) -> None:
        """Let a further model draw, such as the base under another mask."""
        self._pipes[model] = pipe

    def expect(self, texts: Sequence[str]) -> None:
        """Draw captions that will be asked for next together, as many as fill a batch."""
        groups = captions_at_once(texts, self.images_per_round)
        self._together = {text: group for group in groups for text in group}

    @property
    def passes_per_round(self) -> int:
        """Passes that one round of one model costs."""
        return self.images_per_round * self.drawing.passes

    def costs(self, model: str, text: str) -> int:
        """Passes that a caption's first round by one of the models costs: none where it was drawn elsewhere."""
        return 0 if (model, text) in self._drawn else self.passes_per_round

    def seeds(self, turn: int) -> list[int]:
        """Seeds of a round, counted from 0."""
        first = self._seed + turn * self.images_per_round
        return list(range(first, first + self.images_per_round))

    def images(self, model: str, text: str, turns: int = 1) -> list[Image.Image]:
        """A caption's images of the first rounds by one of the models."""
        return [image for turn in range(turns) for image in self._round(model, text, turn)]

    def _round(self, model: str, text: str, turn: int) -> list[Image.Image]:
        name, number = _round_name(model, text, turn), self.images_per_round
        if self._is_missing(model, text, turn):
            texts = [each for each in self._together.get(text, [text]) if self._is_missing(model, each, turn)]
            names = [_round_name(model, each, turn) for each in texts]
            make = partial(draw_captions, self._pipes[model], texts, self.drawing, self.seeds(turn))
            self._folder.kept_or_drawn_together(names, number, make)
        return self._folder.kept_or_drawn(name, number, lambda: self._drawn[model, text])

    def _is_missing(self, model: str, text: str, turn: int) -> bool:
        """Whether images are neither kept nor were drawn elsewhere."""
        is_known = turn == 0 and (model, text) in self._drawn
        return not is_known and not self._folder.keeps(_round_name(model, text, turn), self.images_per_round)


def drawn_images(folder: Path, model: str, text: str) -> list[Image.Image]:
    """What a gallery has kept of a caption by one of the models, in the order of the seeds; nothing is drawn.

    Args:
        folder: the gallery's.
        model: name of the model.
        text: the caption.
    """
    files = folder.glob(f"{_file_name(text)}_{model}_*.png")
    ordered = sorted(files, key=lambda file: [int(number) for number in file.stem.split("_")[-2:]])
    return [Image.open(file).convert("RGB") for file in ordered]


def _file_name(text: str) -> str:
    return text_hash([text])[:20]


def _round_name(model: str, text: str, turn: int) -> str:
    return f"{_file_name(text)}_{model}_{turn}"


def image_latents(pipe: StableDiffusionPipeline, images: Sequence[Image.Image]) -> Tensor:
    """Latents of images as the U-Net has them, [images, channels, height, width], float32.

    Args:
        pipe: its autoencoder is used.
        images: any size.
    """
    with torch.no_grad():
        # The processor scales to -1..1; the size is the model's own.
        factor, size = pipe.vae_scale_factor, pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = pipe.image_processor.preprocess(list(images), height * factor, width * factor)
        encoded = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    return (encoded.float() - shift) * pipe.vae.config.scaling_factor


@torch.no_grad()
def quick_latents(pipe: StableDiffusionPipeline, text: str, seeds: Sequence[int], num_steps: int = 10) -> Tensor:
    """Latents of quickly drawn images, without guidance: a caption's ordinary surroundings for other measurements."""
    with scheduled(pipe, "ddim"):
        drawn = pipe(
            [text] * len(seeds), latents=seeded_latents(pipe, seeds).to(pipe.unet.device, pipe.unet.dtype),
            num_inference_steps=num_steps, guidance_scale=0.0, output_type="latent",
        )  # fmt: skip
    return drawn.images.float()


def encode(pipe: StableDiffusionPipeline, text: str) -> Tensor:
    """A caption's embedding [positions, width], float32."""
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(
            [text], pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return embeds[0].float()


def _empty(pipe: StableDiffusionPipeline) -> Tensor:
    return encode(pipe, "").to(pipe.unet.dtype)
