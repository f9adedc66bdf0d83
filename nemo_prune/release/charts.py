"""Charts as SVG that a page takes in: its colours follow the page's, light or dark."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Visible on white and on black. The two models have the same colours in every chart.
_MODELS = {"base": "#3b82c4", "candidate": "#d9722e", "before": "#3b82c4", "after": "#d9722e"}
_OTHERS = ("#8a939d", "#3f9f5f", "#a06bc0", "#b39c2d")
# Stands for the colour of the page's text.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def lines(
    name: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    cut: float | None = None,
) -> str:
    """Curves over x.

    Args:
        name: of the chart, unlike any other on the page.
        x: where the values are.
        series: curve's name -> one value per x.
        labels: of the two axes.
        cut: where a dashed line is drawn across; None draws none.
    """

    def fill(axes: Axes) -> None:
        for (label, values), colour in zip(series.items(), _colours(series), strict=True):
            axes.plot(x, values, _style(label), label=label, color=colour, marker="o", markersize=3)
        if cut is not None:
            axes.axhline(cut, color=_INK, linestyle="--", linewidth=0.8)
        axes.set_ylim(bottom=min(0, *(value for values in series.values() for value in values)))
        _legend(axes)

    return _drawn(name, labels, fill)


def bars(name: str, values: Mapping[str, int], totals: Mapping[str, int], label: str) -> str:
    """One horizontal bar per name, with its number out of a total."""

    def fill(axes: Axes) -> None:
        names = list(values)
        axes.barh(range(len(names)), [values[each] for each in names], color=_MODELS["candidate"])
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        for place, each in enumerate(names):
            told = f" {values[each]} of {totals[each]}" if each in totals else f" {values[each]}"
            axes.text(values[each], place, told, va="center")
        axes.margins(x=0.2)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _drawn(name, (label, ""), fill, height=0.6 + 0.28 * max(1, len(values)))


def distributions(name: str, groups: Mapping[str, Sequence[float]], label: str, cut: float | None = None) -> str:
    """Histograms of groups, each as a share of itself."""

    def fill(axes: Axes) -> None:
        values = [value for group in groups.values() for value in group]
        low, high = min(values), max(max(values), min(values) + 1e-3)
        for (label, group), colour in zip(groups.items(), _colours(groups), strict=True):
            weights = [1 / len(group)] * len(group)
            axes.hist(group, bins=24, range=(low, high), weights=weights, label=label, color=colour, alpha=0.6)
        if cut is not None:
            axes.axvline(cut, color=_INK, linestyle="--", linewidth=0.8)
        _legend(axes)

    return _drawn(name, (label, "share"), fill)


def _colours(names: Iterable[str]) -> list[str]:
    others = cycle(_OTHERS)
    # A curve of one model and some sort of target begins with the model's name.
    found = [_MODELS.get(name.split(", ")[0]) for name in names]
    return [colour or next(others) for colour in found]


def _legend(axes: Axes) -> None:
    """Above the chart, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _style(name: str) -> str:
    """Curves of controls are dotted, whatever their colour is."""
    return ":" if name.endswith("never trained on") else "-"


def _drawn(name: str, labels: tuple[str, str], fill, height: float = 2.8) -> str:
    # Names inside of an SVG are made from the salt: those of two charts on one page must differ.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
        fill(axes)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names that matplotlib gives to groups repeat from chart to chart.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text))
    return text.replace(_INK, "currentColor")
