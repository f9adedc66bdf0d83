"""Write the figures of the benchmarks into docs/figures.md.

python -m benchmarks.report --localization "the demo model=demo.json" "the reference=reference.json" \\
    --merging "the reference=merging.json"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def main() -> None:
    """Renew the tables between the marks of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--localization", nargs="+", required=True, metavar="MODEL=FILE")
    parser.add_argument("--merging", nargs="+", default=[], metavar="MODEL=FILE")
    arguments = parser.parse_args()
    described = [
        *(_titled("Localization", given, localization_table) for given in arguments.localization),
        *(_titled("One mask for the corpus", given, merging_table) for given in arguments.merging),
    ]
    page = ROOT / "docs" / "figures.md"
    text = page.read_text(encoding="utf-8")
    tables = "\n\n".join(described)
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
    rows = [
        ("U-Net sample passes a memorized prompt, mean", *(f"{n / prompts:.0f}" for n in passes.values())),
        ("the least that any method must make, mean", f"{bound / prompts:.0f}", f"{bound / prompts:.0f}"),
        (f"seconds for the {prompts} prompts", f"{seconds['oracle']:.0f}", f"{engine_seconds:.0f}"),
        ("the same, in all", *(f"{n:,}" for n in passes.values())),
        ("prompts searched set by set, because scores were not monotone", "all", str(figures["not_monotone"])),
        ("peak memory, MB", *(f"{value:.0f}" for value in memory.values())),
    ]
    lines = [("", "the released code's procedure", "nemo-prune"), ("---",) * 3, *rows]
    threads = figures["machine"]["threads"]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\nThe same seeds, initial sets and refined sets for {figures['agreeing']} of {prompts} prompts. One run on "
        f"the CPU, {threads} {'thread' if threads == 1 else 'threads'}; "
        f"{figures['share_of_time_inside_the_unet']:.0%} of the time is spent inside the U-Net. "
        "`python -m benchmarks.localization` reproduces it."
    )


def merging_table(figures: dict) -> str:
    """The ways of merging side by side."""
    lines = [("merge", "neurons", "sample passes", "prompts silenced", "change on ordinary captions"), ("---",) * 5]
    for name, way in figures["ways"].items():
        change = way["change"] / figures["everything_changes"]
        silenced = f"{way['silenced']} of {way['memorized']}"
        lines.append((name, str(way["neurons"]), str(way["sample_passes"]), silenced, f"{change:.1%}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        "\n\nThe change of the noise prediction is a share of that with everything suppressed; `order` is a shuffled "
        "corpus. `python -m benchmarks.merging` reproduces it."
    )


if __name__ == "__main__":
    main()
