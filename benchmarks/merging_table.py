"""The table of masks side by side: one row a figure, one column a way of finding a mask."""

from pathlib import Path

ROWS = {
    "neurons": lambda row: "-" if row["neurons"] is None else str(row["neurons"]),
    "sample passes": lambda row: str(row["sample_passes"]),
    "rounds": lambda row: str(row["rounds"]),
    "memorized captions silent": lambda row: f"{row['silent']} of {row['memorized']}",
    "memorized captions gone": lambda row: f"{row['gone']} of {row['memorized']}",
    "ordinary captions called up": lambda row: str(row["called_up"]),
    "copies, memorized captions": lambda row: _share(row.get("copies_memorized")),
    "copies, ordinary captions": lambda row: _share(row.get("copies_ordinary")),
    "change on ordinary captions": lambda row: f"{row['change']:.2f}",
    "the same by timestep": lambda row: " ".join(f"{value:.2f}" for value in row["change_by_timestep"].values()),
    "1 - SSIM of ordinary images (two seeds)": lambda row: (
        f"{_number(row.get('image_change'))} ({_number(row.get('image_change_two_seeds'))})"
    ),
    "agreement of a memorized caption's seeds": lambda row: f"{row['agreement']:.2f}",
    "1 - SSIM between seeds, memorized (ordinary)": lambda row: (
        f"{_number(row.get('diversity_memorized'))} ({_number(row.get('diversity_ordinary'))})"
    ),
}


def table(figures: dict[str, dict]) -> str:
    """All models' figures as Markdown."""
    lines = []
    for model, ways in figures.items():
        lines += [f"**{Path(model).name}**", "", f"| | {' | '.join(ways)} |", f"|---|{'---|' * len(ways)}"]
        lines += [f"| {name} | {' | '.join(show(row) for row in ways.values())} |" for name, show in ROWS.items()]
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
