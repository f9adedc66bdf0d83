"""Ordinary scenes whose captions leave much open, as those of large corpora do.

In :mod:`scenes` a caption says nearly everything that its picture shows. The seeds of such a
caption agree before anything is memorized, and half of them lie above the threshold of NeMo. Here
one caption in six fixes the whole picture (a flag), and the others name a shape and little else.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from examples.demo_training.scenes import (
    CANVAS_SIZE,
    COLOURS,
    FIRST_NAMES,
    LAST_NAMES,
    MEDIA,
    SHAPES,
    blank,
    choice,
    different_colours,
    draw_shape,
    gradient,
    jitter,
    shade,
    tilt,
    to_array,
    with_article,
)

FLAGS, TWO_SHAPES = 0.16, 0.15
# Shares of the other captions that name the colour of the shape, and the background.
NAMED_COLOUR, NAMED_BACKGROUND = 0.5, 0.15


def vague_scene(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Draw a scene and describe it, mostly in part.

    Returns:
        The caption and the picture, uint8 of shape (64, 64, 3).
    """
    kind = rng.random()
    draw = _flag if kind < FLAGS else _two_shapes if kind < FLAGS + TWO_SHAPES else _one_shape
    caption, canvas = draw(rng)
    caption = choice(rng, MEDIA) + caption
    if rng.random() < 1 / 2:
        caption += f" by {choice(rng, FIRST_NAMES)} {choice(rng, LAST_NAMES)}"
    return caption, to_array(canvas)


def _flag(rng: np.random.Generator) -> tuple[str, Image.Image]:
    """A field with a band and a disc, always at the same place: the caption fixes the picture."""
    field, band = different_colours(rng, 2)
    canvas = blank(jitter(rng, COLOURS[field]))
    pen = ImageDraw.Draw(canvas)
    third = CANVAS_SIZE // 3
    pen.rectangle((0, 0, third, CANVAS_SIZE), fill=jitter(rng, COLOURS[band]))
    pen.ellipse((1.5 * third, third, 2.5 * third, 2 * third), fill=jitter(rng, COLOURS[band]))
    return f"{with_article(field)} and {band} flag", canvas


def _one_shape(rng: np.random.Generator) -> tuple[str, Image.Image]:
    shape = choice(rng, SHAPES)
    colour, *others = different_colours(rng, 5)
    canvas = _background(rng, others)
    radius = rng.uniform(0.2, 0.4) * CANVAS_SIZE
    centre = tuple(rng.uniform(radius, CANVAS_SIZE - radius, 2))
    draw_shape(canvas, shape, centre, radius, jitter(rng, COLOURS[colour]), tilt(rng))
    return _described(rng, shape, colour, others[0]), canvas


def _two_shapes(rng: np.random.Generator) -> tuple[str, Image.Image]:
    first, second = choice(rng, SHAPES), choice(rng, SHAPES)
    colour, *others = different_colours(rng, 5)
    canvas = _background(rng, others[1:])
    turn = rng.uniform(0, 2 * math.pi)
    for side, (shape, name) in enumerate(((first, colour), (second, others[0]))):
        radius = rng.uniform(0.17, 0.23) * CANVAS_SIZE
        away = (0.24 if side else -0.24) * CANVAS_SIZE
        centre = tuple(CANVAS_SIZE / 2 + away * part for part in (math.cos(turn), math.sin(turn)))
        draw_shape(canvas, shape, centre, radius, jitter(rng, COLOURS[name]), tilt(rng))
    return f"{_described(rng, first, colour, others[1])} and {with_article(second)}", canvas


def _described(rng: np.random.Generator, shape: str, colour: str, ground: str) -> str:
    words = with_article(f"{colour} {shape}" if rng.random() < NAMED_COLOUR else shape)
    return words + (f" on {with_article(ground)} background" if rng.random() < NAMED_BACKGROUND else "")


def _background(rng: np.random.Generator, colours: list[str]) -> Image.Image:
    """A canvas mainly of the first colour: plain, shaded, cut in two, or with large spots."""
    base, other, third = (jitter(rng, COLOURS[name]) for name in colours[:3])
    kind = rng.random()
    if kind < 0.2:
        return blank(base)
    if kind < 0.5:
        canvas = gradient(base, shade(base, 0.35) if rng.random() < 0.5 else (250, 250, 250), rng.random())
        return canvas.rotate(90 * int(rng.integers(4)))
    canvas = blank(base)
    pen = ImageDraw.Draw(canvas)
    if kind < 0.75:
        cut = rng.uniform(0.3, 0.7) * CANVAS_SIZE
        pen.rectangle((0, 0, CANVAS_SIZE, cut), fill=other)
        return canvas.rotate(90 * int(rng.integers(4)))
    for fill in (other, third, other):
        x, y = rng.uniform(0, CANVAS_SIZE, 2)
        radius = rng.uniform(0.15, 0.35) * CANVAS_SIZE
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return canvas
