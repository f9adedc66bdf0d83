"""Write the figures of the benchmarks into docs/figures.md and docs/masks.md.

python -m benchmarks.report --localization "the demo model=demo.json" "the reference=reference.json" \\
    --merging merging.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.merging_table import table as merging_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def main() -> None:
    """Renew the tables between the marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--localization", nargs="*", default=[], metavar="MODEL=FILE")
    parser.add_argument("--merging", nargs="*", default=[], metavar="FILE")
    arguments = parser.parse_args()
    if arguments.localization:
        _renew("figures.md", [_titled("Localization", given, localization_table) for given in arguments.localization])
    if arguments.merging:
        figures: dict[str, dict] = {}
        for file in arguments.merging:
            for name, ways in json.loads(Path(file).read_text()).items():
                figures.setdefault(Path(name).name, {}).update(ways)
        _renew("masks.md", [merging_table(figures)])


def _renew(page_name: str, described: list[str]) -> None:
    """Put tables between the marks of a page."""
    page = ROOT / "docs" / page_name
    text = page.read_text(encoding="utf-8")
    tables = "\n\n".join(described).rstrip()
    page.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n{tables}\n{END}{text.split(END)[1]}", encoding="utf-8")


def _titled(title: str, given: str, table: Callable[[dict], str]) -> str:
    model, _, file = given.partition("=")
    return f"**{title}, {model}**\n\n{table(json.loads(Path(file).read_text()))}"


def localization_table(figures: dict) -> str:
    """Engine and plain procedure side by side."""
    passes, seconds, memory = figures["sample_passes"], figures["seconds"], figures["peak_memory_mb"]
    engine_seconds = sorted(seconds["engine"])[len(seconds["engine"]) // 2]
    bound = sum(row["lower_bound"] for row in figures["prompts"])
    prompts = figures["of"]
    in_turn = [str(figures[name]) for name in ("not_monotone", "not_monotone_checked")]
    rows = [
        ("U-Net sample passes a memorized prompt, mean", *(f"{n / prompts:.0f}" for n in passes.values())),
        ("the least that any method must make, mean", *[f"{bound / prompts:.0f}"] * 3),
        (f"seconds for the {prompts} prompts", f"{seconds['oracle']:.0f}", f"{engine_seconds:.0f}", ""),
        ("passes in all", *(f"{n:,}" for n in passes.values())),
        ("prompts searched set by set, because scores were not monotone", "all", *in_turn),
        ("peak memory, MB", *(f"{value:.0f}" for value in memory.values()), ""),
    ]
    header = ("", "the released code's procedure", "nemo-prune run", "nemo-prune localize")
    lines = [header, ("---",) * len(header), *rows]
    threads, agreeing = figures["machine"]["threads"], f"{figures['agreeing']} and {figures['agreeing_checked']}"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\nThe same seeds, initial sets and refined sets for {agreeing} of {prompts} prompts. One run on the CPU, "
        f"{threads} {'thread' if threads == 1 else 'threads'}; "
        f"{figures['share_of_time_inside_the_unet']:.0%} of the time is spent inside the U-Net. "
        "`python -m benchmarks.localization` reproduces it."
    )


if __name__ == "__main__":
    main()
