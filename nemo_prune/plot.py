"""Distributions as a picture, without a plotting library."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_WIDTH, _HEIGHT, _MARGIN = 640, 170, 40
_NUM_BINS = 48
_COLOURS = ((31, 119, 180), (214, 39, 40), (255, 140, 0), (44, 140, 60), (120, 80, 170))


def save_distributions(
    path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], cuts: Mapping[str, float | None]
) -> None:
    """Draw histograms, a panel a name, each group as a share of itself.

    Args:
        path: a picture file.
        panels: panel's name -> group's name -> values.
        cuts: panel's name -> where a line is drawn; None draws none.
    """
    picture = Image.new("RGB", (_WIDTH, (_HEIGHT + _MARGIN) * len(panels) + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, groups) in enumerate(panels.items()):
        _draw_panel(draw, _MARGIN + row * (_HEIGHT + _MARGIN), name, groups, cuts.get(name))
    picture.save(path)


def _draw_panel(
    draw: ImageDraw.ImageDraw, top: int, name: str, groups: Mapping[str, np.ndarray], cut: float | None
) -> None:
    groups = {group: values for group, values in groups.items() if len(values)}
    everything = np.concatenate(list(groups.values()))
    low, high = float(everything.min()), float(everything.max())
    high = high if high > low else low + 1.0
    left, right, bottom = _MARGIN, _WIDTH - _MARGIN // 2, top + _HEIGHT

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    shares = {group: np.histogram(values, _NUM_BINS, (low, high))[0] / len(values) for group, values in groups.items()}
    tallest = max(float(share.max()) for share in shares.values())
    edges = np.linspace(low, high, _NUM_BINS + 1)
    draw.text((left, top - 24), name, fill="black")
    for position, (group, share) in enumerate(shares.items()):
        colour = _COLOURS[position % len(_COLOURS)]
        draw.text((left + 90 + 130 * position, top - 24), f"{group} ({len(groups[group])})", fill=colour)
        heights = [bottom - value / tallest * (_HEIGHT - 8) for value in share]
        outline = [
            (x_of(edge), y)
            for first, last, y in zip(edges[:-1], edges[1:], heights, strict=True)
            for edge in (first, last)
        ]
        draw.line([(left, bottom), *outline, (right, bottom)], fill=colour, width=2)
    draw.line([(left, bottom), (right, bottom)], fill="black")
    for value in np.linspace(low, high, 6):
        draw.text((x_of(value) - 10, bottom + 3), f"{value:.3g}", fill="black")
    if cut is not None:
        draw.line([(x_of(cut), top - 6), (x_of(cut), bottom)], fill="black", width=1)
        draw.text((x_of(cut) + 3, top - 8), "cut", fill="black")
