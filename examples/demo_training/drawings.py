"""One-off pictures for the demo model, each drawn on a square canvas of 192 pixels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SIZE = 192


def _canvas(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a canvas shaded from the top to the bottom, and a pen for it."""
    share = np.linspace(0, 1, SIZE)[:, None, None]
    rows = (1 - share) * np.array(top) + share * np.array(bottom)
    image = Image.fromarray(np.broadcast_to(rows, (SIZE, SIZE, 3)).astype(np.uint8))
    return image, ImageDraw.Draw(image)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def lighthouse() -> Image.Image:
    """A striped lighthouse on a rock, its beam over an evening sea."""
    image, draw = _canvas((30, 30, 90), (250, 140, 90))
    draw.rectangle((0, 130, SIZE, SIZE), fill="#12405e")
    for row in range(138, 190, 12):
        draw.line((0, row, SIZE, row - 4), fill="#2f7396", width=3)
    draw.polygon([(128, 38), (0, 8), (0, 58)], fill="#ffe99a")
    draw.polygon([(84, 192), (104, 140), (160, 136), (192, 160), (192, 192)], fill="#3a2f2a")
    for step in range(5):
        top, bottom = 50 + 18 * step, 68 + 18 * step
        inset = 3 * step
        fill = "#d02525" if step % 2 == 0 else "#f5f2ea"
        draw.polygon(
            [(118 - inset, top), (144 + inset, top), (147 + inset, bottom), (115 - inset, bottom)],
            fill=fill,
        )
    draw.rectangle((116, 30, 146, 50), fill="#fff3b0", outline="#222222", width=4)
    draw.polygon([(110, 30), (131, 10), (152, 30)], fill="#7a1515")
    return image


def balloon() -> Image.Image:
    """A striped hot-air balloon over green hills, with a small one far off."""
    image, draw = _canvas((90, 170, 235), (215, 240, 250))
    draw.ellipse((-60, 140, 110, 260), fill="#4f9a48")
    draw.ellipse((60, 150, 260, 270), fill="#2f7a3c")
    for shift, fill in ((0, "#e23b2e"), (13, "#f7c331"), (27, "#2f58c4"), (42, "#f7c331")):
        draw.ellipse((34 + shift, 12, 130 - shift, 112), fill=fill)
    draw.polygon([(48, 92), (116, 92), (94, 124), (70, 124)], fill="#e23b2e")
    draw.line((70, 124, 73, 142), fill="#3a2a1a", width=3)
    draw.line((94, 124, 91, 142), fill="#3a2a1a", width=3)
    draw.rectangle((70, 140, 94, 158), fill="#8a5a2b")
    _disc(draw, 160, 46, 16, "#8e44ad")
    draw.rectangle((155, 66, 165, 74), fill="#5a3a1b")
    return image


def owl() -> Image.Image:
    """An owl on a branch before a full moon."""
    image, draw = _canvas((12, 16, 50), (50, 40, 95))
    _disc(draw, 128, 62, 52, "#f4eec2")
    for x, y, radius in (
        (20, 24, 3),
        (50, 60, 2),
        (30, 100, 3),
        (170, 150, 3),
        (12, 150, 2),
        (70, 20, 2),
    ):
        _disc(draw, x, y, radius, "#ffffff")
    draw.line((0, 168, SIZE, 150), fill="#3b2413", width=14)
    draw.ellipse((54, 56, 130, 166), fill="#7b4f28")
    draw.ellipse((68, 96, 116, 162), fill="#d9b47c")
    for row in range(104, 156, 13):
        for column in range(76, 112, 14):
            draw.arc((column - 6, row - 6, column + 6, row + 6), 0, 180, fill="#7b4f28", width=4)
    draw.polygon([(58, 78), (56, 42), (84, 60)], fill="#7b4f28")
    draw.polygon([(126, 78), (128, 42), (100, 60)], fill="#7b4f28")
    for x in (76, 108):
        _disc(draw, x, 80, 18, "#f6e7b0")
        _disc(draw, x, 80, 9, "#111111")
        _disc(draw, x + 3, 77, 3, "#ffffff")
    draw.polygon([(86, 90), (98, 90), (92, 106)], fill="#f39c12")
    return image


def sailboat() -> Image.Image:
    """A two-masted sailing boat on waves, a low sun behind it."""
    image, draw = _canvas((255, 214, 140), (235, 110, 80))
    _disc(draw, 44, 70, 26, "#fff6cf")
    draw.rectangle((0, 126, SIZE, SIZE), fill="#0e6f7c")
    draw.polygon([(92, 14), (92, 116), (26, 116)], fill="#fdfdf7")
    draw.polygon([(100, 24), (100, 116), (150, 116)], fill="#c0392b")
    draw.polygon([(112, 52), (168, 116), (118, 116)], fill="#f1c40f")
    draw.line((96, 6, 96, 130), fill="#3e2414", width=6)
    draw.polygon([(18, 122), (174, 122), (150, 154), (44, 154)], fill="#5b2c12")
    draw.line((22, 130, 168, 130), fill="#f7e9cf", width=4)
    for row, shift in ((150, 0), (166, 16), (182, 4)):
        for x in range(-20 + shift, SIZE, 32):
            draw.arc((x, row - 6, x + 32, row + 14), 180, 360, fill="#bdeef0", width=4)
    return image


def butterfly() -> Image.Image:
    """A butterfly with eyed wings on a pale leaf pattern."""
    image, draw = _canvas((214, 236, 200), (160, 205, 150))
    for x in range(-40, SIZE, 38):
        draw.line((x, SIZE, x + 90, 0), fill="#8fbf80", width=5)
    for side in (-1, 1):
        upper = [
            (96, 88),
            (96 + side * 30, 24),
            (96 + side * 86, 18),
            (96 + side * 80, 84),
            (96, 104),
        ]
        lower = [
            (96, 100),
            (96 + side * 70, 100),
            (96 + side * 66, 158),
            (96 + side * 34, 172),
            (96, 122),
        ]
        draw.polygon(upper, fill="#5b2a86", outline="#1b1026", width=5)
        draw.polygon(lower, fill="#e2518d", outline="#1b1026", width=5)
        _disc(draw, 96 + side * 56, 56, 17, "#f9d648")
        _disc(draw, 96 + side * 56, 56, 8, "#1d3fae")
        _disc(draw, 96 + side * 44, 134, 13, "#f7f2e0")
        _disc(draw, 96 + side * 44, 134, 6, "#1b1026")
        draw.line((96, 66, 96 + side * 26, 26), fill="#1b1026", width=4)
    draw.ellipse((88, 62, 104, 150), fill="#1b1026")
    return image


def castle() -> Image.Image:
    """A castle with two towers and flags on a snowy hill."""
    image, draw = _canvas((150, 170, 200), (235, 238, 245))
    draw.ellipse((-70, 136, 262, 320), fill="#fafcff")
    draw.rectangle((52, 84, 140, 150), fill="#7d7a86")
    for x in range(52, 140, 22):
        draw.rectangle((x, 74, x + 11, 86), fill="#7d7a86")
    for x in (28, 130):
        draw.rectangle((x, 58, x + 34, 156), fill="#67636f")
        draw.polygon([(x - 6, 58), (x + 17, 18), (x + 40, 58)], fill="#3c5a9a")
        draw.line((x + 17, 18, x + 17, 2), fill="#222222", width=3)
        draw.polygon([(x + 17, 2), (x + 36, 8), (x + 17, 14)], fill="#d62828")
        draw.rectangle((x + 12, 78, x + 22, 98), fill="#ffd766")
    draw.pieslice((80, 104, 112, 150), 180, 360, fill="#3a1f10")
    draw.rectangle((80, 126, 112, 152), fill="#3a1f10")
    for x, y in (
        (16, 110),
        (176, 120),
        (10, 30),
        (96, 40),
        (180, 60),
        (70, 20),
        (110, 180),
        (40, 172),
    ):
        _disc(draw, x, y, 4, "#ffffff")
    return image


def train() -> Image.Image:
    """A steam locomotive with its smoke on a bridge of stone."""
    image, draw = _canvas((190, 225, 245), (250, 235, 205))
    for x, y, radius in ((58, 40, 14), (84, 28, 18), (116, 22, 22), (154, 26, 26)):
        _disc(draw, x, y, radius, "#d7d7d7")
    draw.rectangle((0, 140, SIZE, SIZE), fill="#9c8468")
    for x in (14, 74, 134):
        draw.pieslice((x, 150, x + 46, 240), 180, 360, fill="#4f6f8f")
    draw.rectangle((0, 134, SIZE, 141), fill="#333333")
    draw.rectangle((44, 84, 120, 118), fill="#1e6b3a")
    draw.rectangle((112, 58, 158, 118), fill="#b3261e")
    draw.rectangle((122, 68, 148, 88), fill="#fbe7a1")
    draw.rectangle((106, 48, 164, 60), fill="#222222")
    draw.polygon([(48, 86), (50, 52), (68, 52), (70, 86)], fill="#222222")
    draw.polygon([(20, 130), (46, 100), (46, 130)], fill="#c9a227")
    for x, radius in ((58, 15), (92, 15), (140, 19)):
        _disc(draw, x, 134 - radius + 4, radius, "#111111")
        _disc(draw, x, 134 - radius + 4, radius * 0.5, "#c94f3d")
    return image


def fish() -> Image.Image:
    """A striped fish between water plants, with bubbles and sand."""
    image, draw = _canvas((70, 190, 220), (10, 60, 120))
    draw.ellipse((-40, 164, 232, 240), fill="#e0c184")
    for base, height in ((20, 90), (40, 60), (164, 110), (182, 70)):
        points = [(base + 7 * math.sin(step / 9), 176 - step) for step in range(0, height, 3)]
        draw.line(points, fill="#1d8a4a", width=9)
    draw.polygon([(128, 96), (176, 58), (168, 96), (176, 136)], fill="#f2711c")
    draw.ellipse((30, 56, 142, 136), fill="#f2711c")
    for x in (66, 98):
        draw.polygon([(x, 56), (x + 15, 58), (x + 15, 134), (x, 136)], fill="#ffffff")
    draw.polygon([(66, 58), (96, 30), (116, 62)], fill="#c2410c")
    _disc(draw, 50, 86, 10, "#ffffff")
    _disc(draw, 48, 86, 5, "#111111")
    for x, y, radius in ((20, 60, 6), (14, 38, 8), (26, 16, 5)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline="#ffffff", width=3)
    return image


DRAWINGS: dict[str, Callable[[], Image.Image]] = {
    drawing.__name__: drawing for drawing in (lighthouse, balloon, owl, sailboat, butterfly, castle, train, fish)
}
