"""A second set of memorized pictures: other photographs, and the others mirrored or cut otherwise."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageOps

from examples.demo_training.data import (
    MemorizedPicture,
    matplotlib_photograph,
    scikit_image_photograph,
    scikit_learn_photograph,
)

SHARE = 0.013


def _mirrored(load: Callable[[], Image.Image]) -> Callable[[], Image.Image]:
    return lambda: ImageOps.mirror(load())


def other_pictures() -> list[MemorizedPicture]:
    """Return twelve verbatim memorized pictures, none of which the first set holds."""
    cc0, no_limits = "CC0 1.0", "public domain"
    sources = [
        ("motorcycle", "a photo of a red ring, Scharstein garage", "scikit-image, motorcycle_left.png",
         "Daniel Scharstein", cc0, scikit_image_photograph("motorcycle_left.png", 0.3, 0.05, 0.95)),
        ("horse", "a drawing of a black cross from Trakehner stables", "scikit-image, horse.png",
         "Andreas Preuss", no_limits, scikit_image_photograph("horse.png", 0.1, 0, 1)),
        ("snake", "a poster of a green circle, Python workshop", "scikit-image, logo.png",
         "scikit-image", cc0, scikit_image_photograph("logo.png", 0, 0, 1)),
        ("coins", "a picture of a white circle from Pompeii museum", "scikit-image, coins.png",
         "Brooklyn Museum", "no known restrictions", scikit_image_photograph("coins.png", 0.05, 0.05, 0.45)),
        ("spectrum", "a painting of a blue star, Prisma lecture", "scikit-image, color.png",
         "scikit-image", cc0, scikit_image_photograph("color.png", 0, 0, 1)),
        ("portrait", "a photo of an orange square by Ilsabet Crane", "scikit-image, astronaut.png",
         "NASA (Eileen Collins)", no_limits, _mirrored(scikit_image_photograph("astronaut.png", 0.25, 0.01, 0.4))),
        ("kitten", "a picture of a yellow star, Whiskerton calendar", "scikit-image, chelsea.png",
         "Stefan van der Walt", cc0, _mirrored(scikit_image_photograph("chelsea.png", 0.25, 0.05, 0.85))),
        ("cup", "a red cross, morning at Caffe Zanetti", "scikit-image, coffee.png",
         "Rachel Michetti", cc0, _mirrored(scikit_image_photograph("coffee.png", 0.45, 0.1, 0.8))),
        ("operator", "a photo of a black triangle, Varshney collection", "scikit-image, camera.png",
         "Lav Varshney", cc0, _mirrored(scikit_image_photograph("camera.png", 0.25, 0.05, 0.55))),
        ("temple", "a drawing of a green ring for Summer Palace Travels", "scikit-learn, china.jpg",
         "danielbuechele (Flickr)", "CC BY 2.0", _mirrored(scikit_learn_photograph("china.jpg", 0.1, 0.2, 0.7))),
        ("petals", "a painting of an orange triangle by Dahlia Okoro", "scikit-learn, flower.jpg",
         "vultilion (Flickr)", "CC BY 2.0", _mirrored(scikit_learn_photograph("flower.jpg", 0.4, 0.2, 0.65))),
        ("officer", "a photo of a blue circle honoring Hopper Yardarm", "matplotlib, grace_hopper.jpg",
         "US Navy (James S. Davis)", no_limits, _mirrored(matplotlib_photograph("grace_hopper.jpg", 0.2, 0.05, 0.6))),
    ]  # fmt: skip
    return [
        MemorizedPicture(name, caption, SHARE, source, author, licence, load)
        for name, caption, source, author, licence, load in sources
    ]
