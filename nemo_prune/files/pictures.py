"""Distributions and counts as pictures, without a plotting library."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _MARGIN = 640, 170, 40
_NUM_BINS = 48
_COLOURS = ((31, 119, 180), (214, 39, 40), (255, 140, 0), (44, 140, 60), (120, 80, 170))

# Twice the size at which a page shows it, to keep letters sharp.
_BARS_WIDTH, _BAR_HEIGHT, _ROW_HEIGHT, _EDGE, _TEXT_SIZE = 1600, 30, 52, 40, 28
_DARK, _GREY, _BAR = "#1f2328", "#6e7781", "#3b6fb6"
_NUM_COLOURS = 32
_LONGEST_LABEL = 48


def save_layer_bars(path: Path, counts: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Draw one bar per layer: how many of its neurons are pruned.

    Args:
        path: a picture file.
        counts: layer -> pruned neurons.
        sizes: layer -> all neurons.
    """
    font, labels = ImageFont.load_default(_TEXT_SIZE), [_label(name) for name in counts]
    values = [f"{count} of {sizes[name]} ({count / sizes[name]:.1%})" for name, count in counts.items()]
    left = _EDGE + max(map(font.getlength, labels)) + 24
    right = _BARS_WIDTH - _EDGE - max(map(font.getlength, values)) - 20
    picture = Image.new("RGB", (_BARS_WIDTH, 2 * _EDGE + _ROW_HEIGHT * (len(counts) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    title = f"Pruned neurons per layer: {sum(counts.values())} of {sum(sizes.values())}"
    draw.text((_EDGE, _EDGE + _BAR_HEIGHT / 2), title, _DARK, ImageFont.load_default(_TEXT_SIZE + 4), "lm")
    for row, (label, value, count) in enumerate(zip(labels, values, counts.values(), strict=True), start=1):
        top = _EDGE + row * _ROW_HEIGHT
        middle, end = top + _BAR_HEIGHT / 2, left + (right - left) * count / max(1, *counts.values())
        draw.text((left - 24, middle), label, _DARK, font, "rm")
        if count:
            draw.rectangle((left, top, max(end, left + 4), top + _BAR_HEIGHT), _BAR)
        draw.text((end + 16, middle), value, _DARK if count else _GREY, font, "lm")
    draw.line((left, _EDGE + _ROW_HEIGHT - 8, left, picture.height - _EDGE), _GREY, 2)
    picture.quantize(_NUM_COLOURS).save(path, optimize=True)


def _label(layer: str) -> str:
    """A layer's name without the part that all layers share, cut to the room there is."""
    name = layer.replace(".transformer_blocks.0.attn2", "")
    return name if len(name) <= _LONGEST_LABEL else "…" + name[1 - _LONGEST_LABEL :]


def save_distributions(
    path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], cuts: Mapping[str, float | None]
) -> None:
    """Draw histograms, one panel per name, each group as a share of itself.

    Args:
        path: a picture file.
        panels: panel's name -> group's name -> values.
        cuts: panel's name -> value at which a line is drawn; None for no line.
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
