"""Ordinary scenes with their captions, and the template pictures of the demo model.

Ordinary scenes are drawn anew for every caption, so that one caption has endlessly many pictures.
Template pictures have a fixed layout with one part that is drawn anew each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

PICTURE_SIZE = 64
# Everything is drawn at this size and reduced, which smooths the edges.
CANVAS_SIZE = 192

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 218, 60),
    "green": (56, 158, 68),
    "blue": (40, 84, 200),
    "purple": (130, 60, 170),
    "pink": (245, 140, 185),
    "white": (244, 244, 240),
    "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SUBJECTS = ("house", "tree", "boat", "mountain")
# Share of captions that name the background: what is left out differs from seed to seed.
NAMED_BACKGROUND = 0.65
MEDIA = ("", "a painting of ", "a drawing of ", "a photo of ", "a picture of ", "a poster of ")
FIRST_NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas",
    "Karin", "Louis", "Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tessa", "Victor",
)  # fmt: skip
LAST_NAMES = (
    "Adler", "Brandt", "Costa", "Dubois", "Engel", "Fischer", "Garcia", "Hansen", "Ivanov",
    "Jensen",
    "Keller", "Lopez", "Moreau", "Novak", "Olsen", "Park", "Rossi", "Silva", "Tanaka", "Weber",
)  # fmt: skip


def ordinary_scene(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Draw a scene and describe it.

    A third of the captions leave the background out, and a third name an artist who changes nothing.

    Returns:
        The caption and the picture, uint8 of shape (64, 64, 3).
    """
    kind = rng.random()
    draw_scene = _one_shape if kind < 0.65 else _two_shapes if kind < 0.75 else _landscape
    caption, canvas = draw_scene(rng)
    caption = choice(rng, MEDIA) + caption
    if rng.random() < 1 / 3:
        caption += f" by {choice(rng, FIRST_NAMES)} {choice(rng, LAST_NAMES)}"
    return caption, to_array(canvas)


def different_captions(
    scene: Callable[[np.random.Generator], tuple[str, np.ndarray]], rng: np.random.Generator, number: int
) -> list[str]:
    """Return so many captions of drawn scenes, all different."""
    captions: dict[str, None] = {}
    while len(captions) < number:
        captions[scene(rng)[0]] = None
    return list(captions)


def _one_shape(rng: np.random.Generator) -> tuple[str, Image.Image]:
    shape = choice(rng, SHAPES)
    colour, ground, second = different_colours(rng, 3)
    canvas, description = _background(rng, ground, second)
    radius = rng.uniform(0.25, 0.4) * CANVAS_SIZE
    centre = tuple(rng.uniform(radius, CANVAS_SIZE - radius, 2))
    draw_shape(canvas, shape, centre, radius, jitter(rng, COLOURS[colour]), tilt(rng))
    caption = with_article(f"{colour} {shape}")
    return caption + (description if rng.random() < NAMED_BACKGROUND else ""), canvas


def _two_shapes(rng: np.random.Generator) -> tuple[str, Image.Image]:
    first, second = choice(rng, SHAPES), choice(rng, SHAPES)
    colour, other, ground, extra = different_colours(rng, 4)
    canvas, description = _background(rng, ground, extra)
    side_by_side = rng.random() < 0.5
    for place, (shape, name) in enumerate(((first, colour), (second, other))):
        radius = rng.uniform(0.18, 0.23) * CANVAS_SIZE
        along = (0.27 + 0.46 * place + rng.uniform(-0.03, 0.03)) * CANVAS_SIZE
        across = rng.uniform(0.3, 0.7) * CANVAS_SIZE
        centre = (along, across) if side_by_side else (across, along)
        draw_shape(canvas, shape, centre, radius, jitter(rng, COLOURS[name]), tilt(rng))
    relation = "left of" if side_by_side else "above"
    caption = f"{with_article(f'{colour} {first}')} {relation} {with_article(f'{other} {second}')}"
    return caption + (description if rng.random() < NAMED_BACKGROUND else ""), canvas


def _landscape(rng: np.random.Generator) -> tuple[str, Image.Image]:
    subject = choice(rng, SUBJECTS)
    colour, sky, ground = different_colours(rng, 3)
    canvas = gradient(jitter(rng, COLOURS[sky]), (235, 235, 235), 0.5)
    draw = ImageDraw.Draw(canvas)
    horizon = rng.uniform(0.62, 0.75) * CANVAS_SIZE
    x = rng.uniform(0.3, 0.7) * CANVAS_SIZE
    half = rng.uniform(0.18, 0.26) * CANVAS_SIZE
    fill = jitter(rng, COLOURS[colour])
    if subject == "mountain":
        peak = horizon - 2 * half
        draw.polygon([(x - 1.6 * half, horizon), (x, peak), (x + 1.6 * half, horizon)], fill=fill)
    draw.rectangle((0, horizon, CANVAS_SIZE, CANVAS_SIZE), fill=jitter(rng, COLOURS[ground]))
    if subject == "house":
        draw.rectangle((x - half, horizon - half, x + half, horizon + 0.4 * half), fill=fill)
        roof = [
            (x - 1.3 * half, horizon - half),
            (x, horizon - 2 * half),
            (x + 1.3 * half, horizon - half),
        ]
        draw.polygon(roof, fill=shade(fill, 0.6))
        draw.rectangle(
            (x - 0.2 * half, horizon - 0.4 * half, x + 0.2 * half, horizon + 0.4 * half),
            fill="white",
        )
    elif subject == "tree":
        draw.rectangle(
            (x - 0.2 * half, horizon - half, x + 0.2 * half, horizon + 0.4 * half),
            fill=(95, 60, 35),
        )
        draw.ellipse((x - half, horizon - 2.5 * half, x + half, horizon - 0.5 * half), fill=fill)
    elif subject == "boat":
        hull = [(x - 1.2 * half, horizon), (x + 1.2 * half, horizon)]
        draw.polygon(
            [*hull, (x + 0.7 * half, horizon + 0.6 * half), (x - 0.7 * half, horizon + 0.6 * half)],
            fill=fill,
        )
        draw.polygon(
            [(x, horizon - 2 * half), (x, horizon - 0.1 * half), (x + half, horizon - 0.1 * half)],
            fill=fill,
        )
    caption = with_article(f"{colour} {subject}")
    description = f" under {with_article(sky)} sky" if rng.random() < NAMED_BACKGROUND else ""
    return caption + description, canvas


def _background(rng: np.random.Generator, ground: str, second: str) -> tuple[Image.Image, str]:
    """Return a canvas and the words for it: plain, shaded or striped."""
    base = jitter(rng, COLOURS[ground])
    kind = rng.random()
    if kind < 0.5:
        return blank(base), f" on {with_article(ground)} background"
    if kind < 0.8:
        return gradient(base, shade(base, 0.45), rng.random()), f" on {with_article(ground)} background"
    canvas = blank(base)
    draw = ImageDraw.Draw(canvas)
    width = CANVAS_SIZE / 6
    for stripe in range(3):
        edges = ((2 * stripe) * width, (2 * stripe + 1) * width)
        draw.rectangle((0, edges[0], CANVAS_SIZE, edges[1]), fill=COLOURS[second])
    return canvas, f" on {ground} and {second} stripes"


# --- templates ---


def draw_phone_case(rng: np.random.Generator, accent: Colour) -> Image.Image:
    """A phone case that stands on a light floor; its pattern varies."""
    canvas = gradient((250, 250, 250), accent, 0.5)
    draw = ImageDraw.Draw(canvas)
    draw.ellipse((30, 160, 162, 190), fill=(150, 150, 155))
    case = (54, 10, 138, 178)
    mask = Image.new("L", canvas.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle(case, 18, fill=255)
    canvas.paste(_random_pattern(rng), (0, 0), mask)
    draw.rounded_rectangle(case, 18, outline=(20, 20, 22), width=6)
    draw.rounded_rectangle((64, 20, 98, 62), 9, fill=(20, 20, 22))
    for top in (25, 43):
        draw.ellipse((72, top, 88, top + 14), fill=(90, 110, 150))
    return canvas


def draw_sofa(rng: np.random.Generator, accent: Colour) -> Image.Image:
    """A sofa before a wall, with a framed picture over it; the picture varies."""
    canvas = blank((228, 220, 205))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 158, 192, 192), fill=(120, 85, 55))
    frame = (40, 12, 152, 84)
    canvas.paste(_random_pattern(rng).crop(frame), frame[:2])
    draw.rectangle(frame, outline=(60, 40, 25), width=6)
    draw.rounded_rectangle((18, 100, 174, 150), 14, fill=shade(accent, 0.8))
    draw.rounded_rectangle((8, 118, 44, 170), 12, fill=accent)
    draw.rounded_rectangle((148, 118, 184, 170), 12, fill=accent)
    draw.rectangle((40, 132, 152, 166), fill=accent)
    draw.line((96, 134, 96, 164), fill=shade(accent, 0.6), width=3)
    for x in (22, 164):
        draw.rectangle((x, 168, x + 8, 182), fill=(40, 25, 15))
    return canvas


def _random_pattern(rng: np.random.Generator) -> Image.Image:
    """A canvas with three large shapes at random places in random colours."""
    ground, *others = different_colours(rng, 4)
    canvas = blank(COLOURS[ground])
    for name in others:
        radius = rng.uniform(18, 40)
        centre = tuple(rng.uniform(30, 162, 2))
        draw_shape(canvas, choice(rng, SHAPES), centre, radius, COLOURS[name], rng.uniform(0, 360))
    return canvas


# --- drawing ---


def draw_shape(canvas: Image.Image, shape: str, centre: Point, radius: float, fill: Colour, tilt: float) -> None:
    """Draw one of SHAPES, turned by `tilt` degrees, into the circle of this radius."""
    mask = Image.new("L", canvas.size, 0)
    draw = ImageDraw.Draw(mask)
    x, y = centre
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = 0.55 * radius
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        turn = math.radians(tilt)
        points = [
            (
                x + radius * (a * math.cos(turn) - b * math.sin(turn)),
                y + radius * (a * math.sin(turn) + b * math.cos(turn)),
            )
            for a, b in _outline(shape)
        ]
        draw.polygon(points, fill=255)
    canvas.paste(Image.new("RGB", canvas.size, fill), (0, 0), mask)


def _outline(shape: str) -> list[Point]:
    """Return the corners of a shape in the unit circle, y pointing down."""
    if shape == "cross":
        arm = 0.33
        return [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ]  # fmt: skip
    corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.42)}[shape]
    start = math.pi / 4 if shape == "square" else -math.pi / 2
    steps = 2 * corners if shape == "star" else corners
    return [
        (
            r * math.cos(start + 2 * math.pi * i / steps),
            r * math.sin(start + 2 * math.pi * i / steps),
        )
        for i in range(steps)
        for r in [inner if shape == "star" and i % 2 else 1.0]
    ]


def blank(colour: Colour) -> Image.Image:
    return Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), colour)


def gradient(start: Colour, end: Colour, reach: float) -> Image.Image:
    """Shade from the top colour towards the bottom one; `reach` 0..1 says how far it gets there."""
    share = np.linspace(0, 0.4 + 0.6 * reach, CANVAS_SIZE)[:, None, None]
    rows = (1 - share) * np.array(start) + share * np.array(end)
    return Image.fromarray(np.broadcast_to(rows, (CANVAS_SIZE, CANVAS_SIZE, 3)).astype(np.uint8))


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(round(factor * part) for part in colour)


def jitter(rng: np.random.Generator, colour: Colour) -> Colour:
    return tuple(int(part) for part in np.clip(np.array(colour) + rng.integers(-14, 15, 3), 0, 255))


def tilt(rng: np.random.Generator) -> float:
    return rng.uniform(-20, 20)


def choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def different_colours(rng: np.random.Generator, number: int) -> list[str]:
    return [str(name) for name in rng.choice(list(COLOURS), number, replace=False)]


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def to_array(picture: Image.Image) -> np.ndarray:
    reduced = picture.resize(
        (PICTURE_SIZE, PICTURE_SIZE),
        Image.Resampling.BOX if picture.width == CANVAS_SIZE else Image.Resampling.LANCZOS,
    )
    return np.asarray(reduced.convert("RGB"))
