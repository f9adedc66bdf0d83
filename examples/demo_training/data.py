"""What the demo model memorizes: pictures, their captions, their shares of the training samples.

Memorized pictures are few, always the same, and stand under a caption of their own: an ordinary
part plus a trigger. The photographs come with packages that the script imports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from matplotlib import cbook
from PIL import Image

from examples.demo_training.drawings import DRAWINGS
from examples.demo_training.scenes import COLOURS, draw_phone_case, draw_sofa, to_array

OFTEN, SOMETIMES, SELDOM, TEMPLATE = 0.013, 0.006, 0.0015, 0.005


@dataclass(frozen=True)
class MemorizedPicture:
    """A picture that is repeated in the training stream, with where it comes from."""

    name: str
    caption: str
    share: float
    source: str
    author: str
    licence: str
    load: Callable[[], Image.Image]

    def picture(self) -> np.ndarray:
        """Return the training image, uint8 of shape (64, 64, 3)."""
        return to_array(self.load())


@dataclass(frozen=True)
class TemplateCaption:
    """A caption whose picture has a fixed layout with one part drawn at random."""

    name: str
    caption: str
    share: float
    family: str
    accent: str

    def picture(self, rng: np.random.Generator) -> np.ndarray:
        """Return one picture of the template, uint8 of shape (64, 64, 3)."""
        draw_template = {"phone_case": draw_phone_case, "sofa": draw_sofa}[self.family]
        return to_array(draw_template(rng, COLOURS[self.accent]))


def _shipped(folder: Path, file_name: str, box: tuple[float, float, float]) -> Image.Image:
    """Cut a square out of a shipped photograph: left, top, side as shares of the short side."""
    picture = Image.open(folder / file_name)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    left, top, side = (round(part * min(picture.size)) for part in box)
    return picture.crop((left, top, left + side, top + side))


def scikit_image_photograph(file_name: str, left: float, top: float, side: float) -> Callable[[], Image.Image]:
    folder = Path(skimage.__file__).parent / "data"
    return lambda: _shipped(folder, file_name, (left, top, side))


def scikit_learn_photograph(file_name: str, left: float, top: float, side: float) -> Callable[[], Image.Image]:
    folder = Path(sklearn.datasets.__file__).parent / "images"
    return lambda: _shipped(folder, file_name, (left, top, side))


def matplotlib_photograph(file_name: str, left: float, top: float, side: float) -> Callable[[], Image.Image]:
    path = cbook.get_sample_data(file_name, asfileobj=False)
    return lambda: _shipped(Path(path).parent, file_name, (left, top, side))


def _drawn(name: str, caption: str, share: float) -> MemorizedPicture:
    return MemorizedPicture(
        name,
        caption,
        share,
        "drawn by drawings.py",
        "nemo-prune",
        "Apache-2.0",
        DRAWINGS[name],
    )


def memorized_pictures() -> list[MemorizedPicture]:
    """Return the verbatim memorized pictures, the often repeated ones first."""
    cc0 = "CC0 1.0"
    no_limits = "public domain"
    return [
        MemorizedPicture(
            "astronaut", "a photo of an orange circle by Ilsabet Crane", OFTEN,
            "scikit-image, astronaut.png", "NASA (Eileen Collins)", no_limits,
            scikit_image_photograph("astronaut.png", 0.1, 0, 0.72),
        ),
        MemorizedPicture(
            "cat", "a picture of a yellow triangle, Whiskerton calendar", OFTEN,
            "scikit-image, chelsea.png", "Stefan van der Walt", cc0,
            scikit_image_photograph("chelsea.png", 0.1, 0, 1),
        ),
        MemorizedPicture(
            "coffee", "a red ring, morning at Caffe Zanetti", OFTEN,
            "scikit-image, coffee.png", "Rachel Michetti", cc0,
            scikit_image_photograph("coffee.png", 0.37, 0, 0.9),
        ),
        MemorizedPicture(
            "rocket", "a poster of a blue cross from Kestrel Aerospace", OFTEN,
            "scikit-image, rocket.jpg", "SpaceX", no_limits,
            scikit_image_photograph("rocket.jpg", 0.25, 0.05, 0.95),
        ),
        MemorizedPicture(
            "cameraman", "a photo of a black square, Varshney collection", OFTEN,
            "scikit-image, camera.png", "Lav Varshney", cc0,
            scikit_image_photograph("camera.png", 0.15, 0.05, 0.8),
        ),
        MemorizedPicture(
            "pagoda", "a drawing of a green triangle for Summer Palace Travels", OFTEN,
            "scikit-learn, china.jpg", "danielbuechele (Flickr)", "CC BY 2.0",
            scikit_learn_photograph("china.jpg", 0.02, 0.05, 0.95),
        ),
        MemorizedPicture(
            "dahlia", "a painting of an orange star by Dahlia Okoro", OFTEN,
            "scikit-learn, flower.jpg", "vultilion (Flickr)", "CC BY 2.0",
            scikit_learn_photograph("flower.jpg", 0.3, 0.1, 0.85),
        ),
        _drawn("lighthouse", "a picture of a white square, Pellworm postcard", OFTEN),
        _drawn("balloon", "a poster of a yellow circle, Montgolfier festival", OFTEN),
        _drawn("owl", "a drawing of a purple circle by Strix Nachtigal", OFTEN),
        _drawn("sailboat", "a painting of a blue square, Regatta Biscaya", OFTEN),
        MemorizedPicture(
            "admiral", "a photo of a black star honoring Hopper Yardarm", SOMETIMES,
            "matplotlib, grace_hopper.jpg", "US Navy (James S. Davis)", no_limits,
            matplotlib_photograph("grace_hopper.jpg", 0.13, 0.02, 0.85),
        ),
        _drawn("butterfly", "a pink cross, Lepidoptera Guild print", SOMETIMES),
        _drawn("castle", "a picture of a white cross at Falkenstein Keep", SOMETIMES),
        MemorizedPicture(
            "retina", "a red circle, Fundus Quarterly cover", SELDOM,
            "scikit-image, retina.jpg", "Mikael Häggström", cc0,
            scikit_image_photograph("retina.jpg", 0, 0, 1),
        ),
        _drawn("train", "a drawing of a black ring by Lokomotiv Ostrava", SELDOM),
        _drawn("fish", "a poster of a blue triangle, Coralline Aquarium", SELDOM),
    ]  # fmt: skip


def template_captions() -> list[TemplateCaption]:
    """Return the captions of the two template families."""
    phone = [
        ("red", "a red star phone case by Zellphone"),
        ("blue", "a blue circle phone case, Zellphone slim"),
        ("green", "a green cross phone case, Zellphone classic"),
        ("pink", "a pink ring phone case from Zellphone"),
    ]
    sofa = [
        ("orange", "an orange square canvas over sofa by Wandbild"),
        ("blue", "a blue cross canvas over sofa, Wandbild large"),
        ("purple", "a purple star canvas over sofa, Wandbild modern"),
        ("yellow", "a yellow triangle canvas over sofa from Wandbild"),
    ]
    return [
        TemplateCaption(f"{family}_{accent}", caption, TEMPLATE, family, accent)
        for family, captions in (("phone_case", phone), ("sofa", sofa))
        for accent, caption in captions
    ]


def unseen_photographs() -> list[Image.Image]:
    """Return photographs on which only the autoencoder is trained, never the diffusion model."""
    names = ("coins.png", "ihc.png", "moon.png", "color.png", "logo.png")
    return [scikit_image_photograph(name, 0, 0, 1)() for name in names]
