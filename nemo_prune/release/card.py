"""From recorded facts to a model card, offline; nothing in it has to be filled in."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath

from huggingface_hub import ModelCardData

from nemo_prune.facts import BaseFacts, EvidenceFacts, ExportReport
from nemo_prune.files.layout import GRID_FILE, PLOT_FILE, RECORD_FILE, ReleaseLayout
from nemo_prune.release.licence import licence_notice
from nemo_prune.release.markdown import HUB, code, table
from nemo_prune.release.record import Record
from nemo_prune.release.wording import before_after_rows, evidence_notes, evidence_rows, layer_rows, prompt_rows

PAPER = "https://arxiv.org/abs/2406.02366"

_NOT_CLAIMED = """\
- **It has not forgotten.** Whatever was measured holds for the prompts that were examined. Optimising a text \
embedding against this model, or fine-tuning it, may bring images back.
- **It protects only where the unpruned weights were never released,** nor those of a sibling that was trained on the \
same images. Base and mask together undo the pruning: anyone who has the base can copy the rows back, and the changed \
rows show where to look.
- **Prompts that were not examined are not covered,** nor images that other prompts give back.
- The files are not smaller: pruned rows take the same space."""

_CITATION = """\
```bibtex
@inproceedings{hintersdorf2024nemo,
  title={Finding {NeMo}: Localizing Neurons Responsible For Memorization in Diffusion Models},
  author={Hintersdorf, Dominik and Struppek, Lukas and Kersting, Kristian and Dziedzic, Adam and Boenisch, Franziska},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}
```"""

# How a card names its own folder before it has a name on the Hub: any other name would be this machine's.
# The work folder of whoever made it has no name either.
_WORK = "work"
_PIPELINE_HERE, _HERE = 'from_pretrained("."', '  # "." is this folder'


def model_card(record: Record, layout: ReleaseLayout, examples: Sequence[str] = ()) -> str:
    """The card that is beside the pruned weights; it names no caption and shows no image unless asked.

    Args:
        record: of a run or of an export.
        layout: of the release, whose files the card names.
        examples: captions to publish, in the order of the rows of the before/after grid.
    """
    is_run = record.measured is not None
    parts = [
        f"---\n{_metadata(record).to_yaml()}\n---",
        f"# {_title(record.base)}",
        f"{_base(record.base)}, pruned against the memorization of training images by nemo-prune "
        f"{record.versions['nemo-prune']} with the method NeMo ([Hintersdorf et al., NeurIPS 2024]({PAPER})). "
        "It loads with stock diffusers.",
        "## What is not claimed",
        _NOT_CLAIMED,
        "## What was changed",
        _changes(record),
        "## What was found",
        *([table(("prompts", "number"), prompt_rows(record.prompts))] if is_run else _told_by_the_mask(record)),
        f"![Pruned neurons per layer]({layout.name(layout.plot)})",
        table(("layer", "pruned", "of"), layer_rows(record.mask)),
        *(["## Before and after", table(("measured", "before", "after"), before_after_rows(record))] if is_run else []),
        *(_evidence(record.measured.evidence) if is_run and record.measured.evidence else []),
        *(_examples(examples, layout) if examples else []),
        "## Use",
        _use(record.base, layout),
        "## Rebuild it",
        _rebuilding(record, layout),
        "## Licence",
        licence_notice(record.licence),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def named(card: str, repo_id: str) -> str:
    """The same card for where it is published: its commands name the repo instead of their own folder.

    Args:
        card: of :func:`model_card`; it may have been edited since.
        repo_id: its id on the Hub.
    """
    card = card.replace(_PIPELINE_HERE, f'from_pretrained("{repo_id}"').replace(_HERE, "")
    card = re.sub(rf" --mask (?!{_WORK} ).+ --out ", f" --mask {repo_id} --out ", card)
    card = re.sub(r"from_single_file\(\"(?!https:)", f'from_single_file("{HUB}/{repo_id}/blob/main/', card)
    # A repo has the pictures where a folder has them, and a single file beside the card.
    for picture in (PurePath(PLOT_FILE), PurePath(GRID_FILE)):
        card = card.replace(f"]({picture.name})", f"]({picture.as_posix()})")
    return card


def _metadata(record: Record) -> ModelCardData:
    repo_id = record.base.repo_id
    return ModelCardData(
        base_model=repo_id,
        base_model_relation="finetune" if repo_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["nemo-prune", "memorization", "stable-diffusion"],
        **record.licence.fields,
    )


def _title(base: BaseFacts) -> str:
    name = (base.repo_id or "").rpartition("/")[2]
    if not name:
        return "Pruned against memorization"
    # Nothing in such a name is Markdown.
    is_plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name)
    return f"{name if is_plain else code(name)}, pruned against memorization"


def _base(base: BaseFacts) -> str:
    if base.stated_by_publisher:
        return f"A local checkpoint ({code(base.repo_id)} by its publisher's word, which was not checked)"
    if base.repo_id:
        return f"{code(base.repo_id)} at commit {code(base.commit)}"
    return base.name[:1].upper() + base.name[1:]


_KEPT = {
    "zero": "",
    "mean": " Of each neuron its mean on ordinary captions is kept: the biases behind these layers are shifted by it.",
    "compensated": " What kept neurons tell of them on ordinary captions stands in for them, and on memorized captions "
    "all neurons of these layers are held near their means: weights and biases behind them differ by that. "
    "The mask in this release does not say by what, because that could be undone without the base.",
}


def _changes(record: Record) -> str:
    mask = record.mask
    done = f"multiplied by {mask.scale:g}" if mask.scale else "set to zero"
    changed = ", ".join(
        f"{code(path)} ({rows} {'row' if rows == 1 else 'rows'} {done})"
        for path, rows in record.files.rows_changed.items()
    )
    parts = [
        f"> **Notice: files of the base model were changed:** {changed}. They belong to **{mask.num_neurons} of "
        f"{sum(mask.sizes.values())} neurons** of the layers through which the text enters.{_KEPT[mask.ablation]} No "
        "other weight differs from the base."
    ]
    if mask.forced_on_another_base:
        made_for = (mask.made_for and mask.made_for.name) or "an unknown base"
        parts.append(f"**The mask was made for another base ({code(made_for)}) and was forced on this one.**")
    return "\n\n".join([*parts, *record.files.notes, *_dropped(record.files), *_left_out(record.files)])


def _dropped(files: ExportReport) -> list[str]:
    """Which keys configs and headers do not have any more."""
    if not files.dropped:
        return []
    listed = "\n".join(f"- {code(path)}: {', '.join(map(code, keys))}" for path, keys in files.dropped.items())
    return [
        "Dropped from the base's configs and headers, because it tells of local paths, data or captions, or does not "
        f"fit a stock pipeline:\n\n{listed}"
    ]


def _left_out(files: ExportReport) -> list[str]:
    """What of the base is not there, one line per reason."""
    if not files.left_out:
        return []
    paths_of: dict[str, list[str]] = {}
    for path, reason in files.left_out.items():
        paths_of.setdefault(reason, []).append(code(path))
    listed = "\n".join(f"- {', '.join(paths)}: {reason}" for reason, paths in paths_of.items())
    return [f"Left out of the base's files:\n\n{listed}"]


def _told_by_the_mask(record: Record) -> list[str]:
    """What stands in for findings where a finished mask was used."""
    parts = [
        "**Nothing was measured on this model.** It was made from a base and a finished mask (`nemo-prune export`); "
        "what was measured when the mask was found is in the card that the mask was published with."
    ]
    if record.prompts:
        name = record.mask.made_for and record.mask.made_for.name
        base = f" in {code(name)}" if name else ""
        parts.append(
            f"The metadata of the mask say that it was found{base} with these prompts; nobody checked it here:"
        )
        parts.append(table(("prompts", "number"), prompt_rows(record.prompts)))
    return parts


def _evidence(evidence: EvidenceFacts) -> list[str]:
    return [
        "## What it still gives back",
        table(("measured", "base", "pruned"), evidence_rows(evidence)),
        " ".join(evidence_notes(evidence)),
    ]


def _examples(captions: Sequence[str], layout: ReleaseLayout) -> list[str]:
    listed = "\n".join(f"- {code(caption)}" for caption in captions)
    return [
        "## Examples",
        f"![Training images, and images before and after pruning]({layout.name(layout.grid)})",
        f"Each row is a caption: its training image, where one is known, images before the pruning, and the same seeds "
        f"after it. The captions of the rows:\n\n{listed}",
    ]


def _use(base: BaseFacts, layout: ReleaseLayout) -> str:
    if layout.file:
        return f"""\
```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_single_file({json.dumps(layout.file.name)})
image = pipe("a caption").images[0]
```"""
    variant = f", variant={json.dumps(base.variant)}" if base.variant else ""
    return f"""\
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.{_PIPELINE_HERE}{variant}){_HERE}
image = pipe("a caption").images[0]
```"""


def _rebuilding(record: Record, layout: ReleaseLayout) -> str:
    """The commands that make the same files from base and mask, and what must come out."""
    base, mask, files = record.base, record.mask, record.files
    model = base.model or "base"
    version = _options(("--revision", base.commit), ("--variant", base.variant))
    # A folder of configs has no name that means anything elsewhere.
    config = _options(("--config", base.config if base.config and " " not in base.config else None))
    out = "rebuilt.safetensors" if layout.file else "rebuilt"
    # The mask of a single file is found by the file's name.
    mask_file = shlex.quote(layout.file.name) if layout.file else layout.name(layout.mask)
    scale = _options(("--scale", repr(mask.scale) if mask.scale else None))
    force = " --force" if mask.forced_on_another_base else ""
    where = "" if base.model else " `base` stands for the base model, wherever it is."
    checked = ""
    if mask.ablation == "compensated":
        mask_file = _WORK
        where += f" The whole mask is in the work folder of the run that made it, {code(_WORK)} here."
        checked = " Of weights and biases behind the rows the mask in this release has the sha256."
    hashes = "\n".join(f"- {code(path)}: {code(files.sha256[path])}" for path in files.rows_changed)
    return f"""\
Base and mask give the same files again, byte for byte.{where}

```bash
nemo-prune export --model {model}{version}{config} \\
  --mask {mask_file} --out {out}{scale}{force}
nemo-prune diff {model} {out}{version}
```

The second command exits with 0 where nothing but what the mask changes differs from the base.{checked} The sha256 of \
what must come out:

{hashes}

`{RECORD_FILE}` has the hashes of all files, versions, settings and seeds."""


def _options(*pairs: tuple[str, str | None]) -> str:
    return "".join(f" {name} {shlex.quote(value)}" for name, value in pairs if value)
