"""From a run's recorded facts to a model card and to the report of the work folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

_NOT_CLAIMED = """\
- **It has not forgotten.** The pruned model no longer replicates on the prompts that were examined. Whoever optimises \
a text embedding against it, or fine-tunes it, may bring images back.
- **It protects only where the unpruned weights were never released.** Whoever has them can copy the zeroed rows back; \
the zeroed rows also show where to look.
- Prompts that were not examined, and images that other prompts give back, are not covered.
- The files are not smaller: zeroed rows take the same space."""

_NOT_MEASURED = """\
Not measured for this folder: it was made from a base and a finished mask (`nemo-prune export`). What was measured \
when the mask was found stands in the card that the mask was published with."""

_USE = """\
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER")
image = pipe("a caption").images[0]
```"""

_PAPER = """\
```bibtex
@inproceedings{hintersdorf2024nemo,
  title={Finding {NeMo}: Localizing Neurons Responsible For Memorization in Diffusion Models},
  author={Hintersdorf, Dominik and Struppek, Lukas and Kersting, Kristian and Dziedzic, Adam and Boenisch, Franziska},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}
```"""


def licence_fields(base: Path) -> dict[str, str]:
    """The licence fields of the base model's card; ``other`` where it names none, never a guess."""
    path = base / "README.md"
    fields: dict[str, str] = {}
    if path.exists():
        try:
            data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError):
            data = {}
        fields = {key: str(data[key]) for key in ("license", "license_name", "license_link") if data.get(key)}
    return fields if "license" in fields else {"license": "other"}


def model_card(facts: Mapping, licence: Mapping[str, str], examples: Sequence[str] = (), grid: str = "") -> str:
    """The card that lies beside the pruned weights; it names no caption and shows no image unless asked.

    Args:
        facts: the record of the run.
        licence: licence fields of the base, see :func:`licence_fields`.
        examples: captions to publish.
        grid: file name of the before/after grid to show, relative to the card.
    """
    repo_id = facts["base"]["repo_id"]
    data = ModelCardData(
        base_model=repo_id,
        base_model_relation="finetune" if repo_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["nemo-prune", "memorization", "stable-diffusion"],
        **licence,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Pruned against memorization",
        f"The weights of {_base(facts)} with **{facts['mask']['num_neurons']} memorization neurons "
        f"{_what_was_done(facts)}** by "
        f"[nemo-prune](https://arxiv.org/abs/2406.02366) {facts['versions']['nemo-prune']}. "
        "It loads with stock diffusers.",
        f"> **Notice: files were changed.** {_changed_files(facts)} No other weight differs from the base.",
        "## What is not claimed",
        _NOT_CLAIMED,
        "## What was found",
        *([_table(("prompts", "number"), _prompt_rows(facts))] if facts.get("prompts") else []),
        _table(("layer", "pruned", "of"), _layer_rows(facts)),
        "## Before and after",
        before_after_table(facts) if "scores" in facts else _NOT_MEASURED,
    ]
    if examples:
        captions = "\n".join(f"- {_as_text(text)}" for text in examples)
        parts += ["## Examples", f"![Before and after pruning]({grid})", captions]
    parts += [
        "## Use",
        _USE,
        "`nemo_prune.json` records versions, settings, seeds and hashes; `nemo_prune/mask.safetensors` holds the mask. "
        "Base and mask together rebuild this release.",
        "## Licence",
        _licence_text(licence),
        "## Source of the method",
        _PAPER,
    ]
    return "\n\n".join(parts) + "\n"


def run_report(facts: Mapping, prompts: Sequence[Mapping]) -> str:
    """The full report for the work folder, with every caption: not for publication."""
    columns = ("status", "kind", "score", "neurons", "under the mask", "fresh before", "fresh after",
               "copies before", "copies after", "caption")  # fmt: skip
    rows = [
        (
            each["status"], each["kind"] or "", _number(each["score"]), len(each["neurons"]),
            _number(each["suppressed_similarity"]), _number(each["score_before"]), _number(each["score_after"]),
            _share(each.get("copies_before")), _share(each.get("copies_after")), _as_text(each["prompt"]),
        )
        for each in prompts
    ]  # fmt: skip
    parts = [
        "# nemo-prune: report of a run",
        "Holds captions and images: not for publication.",
        f"Base: {_base(facts)}. Threshold {facts['calibration']['threshold']:.3f}, {facts['calibration']['origin']}.",
        _table(("prompts", "number"), _prompt_rows(facts)),
        _table(("layer", "pruned", "of"), _layer_rows(facts)),
        before_after_table(facts),
        "![before and after](grids/memorized.png)",
        "![ordinary prompts before and after](grids/ordinary.png)",
        _table(columns, rows),
    ]
    return "\n\n".join(parts) + "\n"


def before_after_table(facts: Mapping) -> str:
    """Markdown table of what was measured before and after pruning."""
    return _table(("measured", "before", "after"), before_after_rows(facts))


def before_after_rows(facts: Mapping) -> list[tuple[str, str, str]]:
    """What was measured before and after pruning, as text: name, before, after."""
    scores, images, cost = facts["scores"], facts["images"], facts["cost"]
    memorized, ordinary = images["memorized"], images["ordinary"]
    rows = [
        (
            f"memorized prompts ({facts['prompts']['memorized']}) above the threshold on fresh seeds",
            str(scores["above_threshold_before"]),
            str(scores["above_threshold_after"]),
        ),
        (
            "their memorization score on fresh seeds, median",
            _number(scores["median_before"]),
            _number(scores["median_after"]),
        ),
        (
            "their noise prediction against the unpruned one, highest similarity, median",
            "1.000",
            _number(scores["median_suppressed_similarity"]),
        ),
    ]
    if memorized["copies_before"] is not None:
        name = f"images of {memorized['num_prompts']} memorized prompts that copy any training image"
        cut = f" (SSIM and correlation at least {images['cut']:.2f})"
        rows.append((name + cut, _share(memorized["copies_before"]), _share(memorized["copies_after"])))
    if memorized["num_prompts"]:
        between = _number(memorized["between_seeds_before"]), _number(memorized["between_seeds_after"])
        rows.append(("similarity of a memorized prompt's images between seeds (SSIM), mean", *between))
        rows.append(
            ("their similarity to the unpruned model's images, mean", "1.000", _number(memorized["to_unpruned"]))
        )
    if ordinary["num_prompts"]:
        name = f"similarity of {ordinary['num_prompts']} ordinary prompts' images to the unpruned model's, mean"
        rows.append((f"{name} (between seeds: {ordinary['between_seeds_before']:.3f})", "1.000",
                     _number(ordinary["to_unpruned"])))  # fmt: skip
    controls = f"as many random neurons: {_share(cost['random'])}; everything suppressed: {_share(cost['everything'])}"
    rows.append((f"change of the noise prediction on ordinary prompts ({controls})", "0.0%", _share(cost["mask"])))
    return rows


def _prompt_rows(facts: Mapping) -> list[tuple[str, int]]:
    counts = facts["prompts"]
    return [
        ("examined", counts["total"]),
        ("localized", counts["localized"]),
        ("not memorized", counts["not_memorized"]),
        ("unresolved" + (" (in the mask)" if counts["unresolved_included"] else " (not in the mask)"),
         counts["unresolved"]),
    ]  # fmt: skip


def _layer_rows(facts: Mapping) -> list[tuple[str, int, int]]:
    sizes = facts["mask"]["sizes"]
    rows = [(f"`{name}`", count, sizes[name]) for name, count in facts["mask"]["counts"].items()]
    return [*rows, ("all", facts["mask"]["num_neurons"], sum(sizes.values()))]


def _base(facts: Mapping) -> str:
    base = facts["base"]
    return base["name"] + (f" at commit `{base['commit']}`" if base["commit"] else "")


def _changed_files(facts: Mapping) -> str:
    changed = facts["files"]["rows_changed"]
    done = "set to zero" if not facts["mask"]["scale"] else f"multiplied by {facts['mask']['scale']:g}"
    return " ".join(f"`{path}`: {rows} rows {done}." for path, rows in changed.items()) + _forced(facts)


def _what_was_done(facts: Mapping) -> str:
    return "zeroed" if not facts["mask"]["scale"] else f"scaled by {facts['mask']['scale']:g}"


def _forced(facts: Mapping) -> str:
    if not facts["mask"].get("forced_on_another_base"):
        return ""
    made_for = (facts["mask"]["made_for"] or {}).get("name", "an unknown base")
    return f" **The mask was made for another base ({made_for}) and was forced on this one.**"


def _licence_text(licence: Mapping[str, str]) -> str:
    if licence["license"] == "other":
        return (
            "The base model's card names no licence. **Whoever publishes this model must state the licence** of the "
            "base here and in the metadata above."
        )
    return f"As the base model's: `{licence.get('license_name', licence['license'])}`. Its terms go on to apply."


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _as_text(caption: str) -> str:
    """A caption that can break neither a table nor the Markdown nor the HTML around it."""
    flat = " ".join(caption.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{char}" if char in "\\`*_{}[]()#+-.!|~" else char for char in flat)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
