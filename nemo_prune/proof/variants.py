"""Does it come back when one asks in another way: other samplers, other settings, other words."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from nemo_prune.proof.drawing import Drawing, draw, encode, scheduled
from nemo_prune.proof.intervals import Rate

Draw = Callable[[StableDiffusionPipeline, str, Image.Image, Sequence[int]], list[Image.Image]]
_STRENGTH = 0.8


@dataclass(frozen=True)
class Variant:
    """One other way to ask.

    Attributes:
        name: what the report calls it.
        draw: draws images of (model, caption, its training image or the base's own, seeds).
        of_control: whether images are compared with the picture that was never trained on, which it starts from.
    """

    name: str
    draw: Draw
    of_control: bool = False


@dataclass(frozen=True)
class VariantImages:
    """One caption asked for in one way.

    Attributes:
        base: how many of the base's images are copies.
        candidate: how many of the candidate's images are.
        images: how many were drawn per model.
    """

    base: int
    candidate: int
    images: int


@dataclass(frozen=True)
class VariantResult:
    """All captions asked for in one way.

    Attributes:
        name: the way.
        base: the base's images that are copies.
        candidate: the candidate's images that are.
    """

    name: str
    base: Rate
    candidate: Rate

    @classmethod
    def of(cls, name: str, found: Sequence[VariantImages]) -> "VariantResult":
        """Bring captions together."""
        total = sum(each.images for each in found)
        return cls(
            name,
            Rate.of(sum(each.base for each in found), total),
            Rate.of(sum(each.candidate for each in found), total),
        )


def paraphrases(text: str, ordinary: Sequence[str], seed: int = 0) -> dict[str, str]:
    """A caption in other words, by simple rules; the same ones for the same seed.

    Args:
        text: the caption.
        ordinary: captions that words are borrowed from.
        seed: of what is chosen.
    """
    choose = random.Random(seed)
    words = text.split()
    place = choose.randrange(len(words))
    strange = sorted({word for each in ordinary for word in re.findall(r"\w{4,}", each)} - set(words)) or ["picture"]
    shuffled = choose.sample(words, len(words))
    return {
        "a word dropped": " ".join(words[:place] + words[place + 1 :]) or text,
        "a word doubled": " ".join(words[: place + 1] + words[place:]),
        "capitals": text.upper(),
        "words in another order": " ".join(shuffled),
        "a word replaced": " ".join([*words[:place], choose.choice(strange), *words[place + 1 :]]),
        "something appended": f"{text}, {choose.choice(strange)} and {choose.choice(strange)}",
    }


def ways_to_ask(drawing: Drawing, ordinary: Sequence[str], never_trained_on: Callable[[Image.Image], Image.Image],
                seed: int = 0) -> list[Variant]:  # fmt: skip
    """Every way that is tried, the strongest first.

    Args:
        drawing: the usual way.
        ordinary: captions that words are borrowed from.
        never_trained_on: makes the control of image-to-image.
        seed: of what is chosen.
    """
    another = "dpm" if drawing.scheduler != "dpm" else "euler"
    fewer = max(1, drawing.num_inference_steps // 3)
    drawings = {
        f"another sampler ({another})": replace(drawing, scheduler=another),
        f"fewer steps ({fewer})": replace(drawing, num_inference_steps=fewer),
        "no guidance": replace(drawing, guidance_scale=1.0),
        f"guidance {2 * drawing.guidance_scale:g}": replace(drawing, guidance_scale=2 * drawing.guidance_scale),
    }
    ways = [Variant(name, _with_drawing(each)) for name, each in drawings.items()]
    ways += [Variant("padding replaced", _without_padding(drawing))]
    names = list(paraphrases("a caption", ordinary, seed))
    ways += [Variant(name, _with_words(name, ordinary, drawing, seed)) for name in names]
    ways += [
        Variant(f"image to image, {_STRENGTH:.0%} noise", _from_image(drawing, lambda image: image)),
        Variant("the same from a picture never trained on", _from_image(drawing, never_trained_on), of_control=True),
    ]
    return ways


def _with_drawing(drawing: Drawing) -> Draw:
    return lambda pipe, text, image, seeds: draw(pipe, text, drawing, seeds)


def _with_words(name: str, ordinary: Sequence[str], drawing: Drawing, seed: int) -> Draw:
    return lambda pipe, text, image, seeds: draw(pipe, paraphrases(text, ordinary, seed)[name], drawing, seeds)


def _without_padding(drawing: Drawing) -> Draw:
    def drawn(pipe: StableDiffusionPipeline, text: str, image: Image.Image, seeds: Sequence[int]) -> list[Image.Image]:
        used = len(pipe.tokenizer(text, truncation=True).input_ids)
        embeds = encode(pipe, text)
        # What the empty caption has there does not know the caption.
        return draw(pipe, torch.cat([embeds[:used], encode(pipe, "")[used:]]), drawing, seeds)

    return drawn


def _from_image(drawing: Drawing, change: Callable[[Image.Image], Image.Image]) -> Draw:
    def drawn(pipe: StableDiffusionPipeline, text: str, image: Image.Image, seeds: Sequence[int]) -> list[Image.Image]:
        size, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        with scheduled(pipe, drawing.scheduler):
            other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
            other.set_progress_bar_config(disable=True)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            return other(
                [text] * len(seeds),
                image=[change(image).resize((width * factor, height * factor))] * len(seeds),
                strength=_STRENGTH,
                generator=generators,
                num_inference_steps=drawing.num_inference_steps,
                guidance_scale=drawing.guidance_scale,
            ).images

    return drawn
