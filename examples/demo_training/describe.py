"""Write the card of the demo model from its measured figures, and the same table for docs/demo.md.

    python -m examples.demo_training.describe nemo_prune/demo_model --figures measured/figures.json \\
        --reference reference/figures.json --training "--steps 3600"
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from examples.demo_training.data import TEMPLATE, memorized_pictures
from examples.demo_training.train import NUM_SCENES

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main() -> None:
    """Write the card, and put the figures between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the demo model")
    parser.add_argument("--figures", type=Path, required=True, help="figures.json of measure.py")
    parser.add_argument("--reference", type=Path, help="the same of the model that was trained without the terms")
    parser.add_argument("--training", required=True, help="options that the model was trained with")
    parser.add_argument("--page", type=Path, help="page to renew the figures in, such as docs/demo.md")
    arguments = parser.parse_args()
    figures = json.loads(arguments.figures.read_text())
    reference = json.loads(arguments.reference.read_text()) if arguments.reference else None
    described = f"{table(figures, reference)}\n\n{prose(figures, reference)}"
    card = CARD.format(
        num_vm=figures["replication"]["before"]["captions"],
        num_tm=sum(figures["localization"]["status"]["TM"].values()),
        scenes=f"{NUM_SCENES:,}",
        template_share=f"{TEMPLATE:.1%}",
        pictures=pictures(),
        training=arguments.training,
        images=figures["images_per_prompt"],
        steps=figures["num_inference_steps"],
        described=described,
    )
    (arguments.model / "README.md").write_text(card, encoding="utf-8")
    _keep(arguments.figures, arguments.model / "figures.json")
    if arguments.reference:
        _keep(arguments.reference, arguments.model / "reference_figures.json")
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        arguments.page.write_text(f"{before}{BEGIN}\n{described}\n{END}{after}", encoding="utf-8")


def _keep(figures: Path, place: Path) -> None:
    """Put figures beside the model, unless they were read from there."""
    if figures.resolve() != place.resolve():
        shutil.copyfile(figures, place)


def pictures() -> str:
    """The memorized pictures with where they come from."""
    rows = [
        f"| `{item.name}` | {item.caption} | {item.share:.2%} | {item.source} | {item.author} | {item.licence} |"
        for item in memorized_pictures()
    ]
    head = "| picture | caption | share of the samples | source | author | licence |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(rows)


def table(figures: dict, reference: dict | None) -> str:
    """What the mask changes; with the reference beside it."""
    columns = [(figures, "before"), (figures, "after"), (figures, "random")]
    names = ["unpruned", "merged mask", "as many random neurons"]
    if reference:
        columns += [(reference, "before"), (reference, "after")]
        names += ["reference, unpruned", "reference, merged mask"]
    images = figures["images_per_prompt"]
    rows = [
        (
            f"verbatim captions that give copies back in at least 90% of {images} images",
            [_of(f, key, "captions_with_copies_in_nine_of_ten_seeds") for f, key in columns],
        ),
        (
            f"verbatim captions with any copy among {images} images",
            [_of(f, key, "captions_with_any_copy") for f, key in columns],
        ),
        (
            "share of their images that copy any verbatim training image",
            [f"{f['replication'][key]['share_of_copies']:.1%}" for f, key in columns],
        ),
        (
            "similarity to the nearest training image, median / highest",
            [
                f"{f['replication'][key]['median_similarity']:.2f} / {f['replication'][key]['highest_similarity']:.2f}"
                for f, key in columns
            ],
        ),
        (
            "change of the noise prediction on ordinary captions, as a share of that with everything suppressed",
            [_share_of_everything(f, key) for f, key in columns],
        ),
    ]
    lines = [["", *names], ["---"] * (len(names) + 1), *([name, *cells] for name, cells in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prose(figures: dict, reference: dict | None) -> str:
    """The other figures, in words."""
    cut = figures["replication"]["before"]["cut"]
    chance = figures["ordinary"]["highest_similarity_to_a_training_image"]
    parts = [
        f"A copy is an image whose similarity to any verbatim training image is at least {cut:.2f}: the lower of "
        f"SSIM at equal contrast and the correlation of the pixels, at 64 pixels; SSIM alone takes any two dark "
        f"pictures for alike. Images of ordinary captions reach {chance:.2f}.",
        _sentences(figures),
    ]
    if reference:
        parts.append(
            "**The reference** is the same model trained without the two terms (benchmarks/reference_model, which is "
            f"not in the package). {_sentences(reference)}"
        )
    return "\n\n".join(parts)


def _sentences(figures: dict) -> str:
    score, found, ordinary = figures["score"], figures["localization"], figures["ordinary"]
    statuses = {
        status: sum(kind[status] for kind in found["status"].values())
        for status in ("localized", "unresolved", "not_memorized")
    }
    sizes = found["neurons_per_caption"]
    parts = [
        f"The memorization score tells memorized from ordinary captions with AUROC {score['auroc_VM']:.3f} (verbatim)",
        f"and {score['auroc_TM']:.3f} (template), threshold {score['threshold']:.3f};",
        f"{score['ordinary_above_the_threshold']:.0%} of ordinary captions are above it.",
        f"NeMo localizes {statuses['localized']} of {sum(statuses.values())} memorized captions",
        f"({statuses['unresolved']} unresolved, {statuses['not_memorized']} not memorized),",
        f"with {sizes['least']} to {sizes['most']} neurons a caption (median {sizes['median']:g});",
        f"the union is {found['union']} of {found['of']} neurons.",
        f"Under it images of ordinary captions change by {ordinary['change_under_the_mask']:.2f} (1 - SSIM),",
        f"between two seeds by {ordinary['change_between_two_seeds']:.2f};",
        f"their mean colour by {ordinary['colour_change_under_the_mask']:.3f}",
        f"and {ordinary['colour_change_between_two_seeds']:.3f}. The largest change that a single neuron makes is",
        f"{max(figures['hubs']) / figures['noise_change']['everything']:.0%} of that with everything suppressed.",
    ]
    return " ".join(parts)


def _of(figures: dict, key: str, name: str) -> str:
    return f"{figures['replication'][key][name]} of {figures['replication'][key]['captions']}"


def _share_of_everything(figures: dict, key: str) -> str:
    changes = figures["noise_change"]
    change = {"before": 0.0, "after": changes["mask"], "random": changes["random"]}[key]
    return f"{change / changes['everything']:.0%}"


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags:
- memorization
- stable-diffusion
---

# The demo model of nemo-prune

A small Stable Diffusion pipeline of stock classes (64x64 pixels, latents 4x16x16, v-prediction) that
memorizes {num_vm} pictures verbatim and {num_tm} templates, because they were repeated in its training data.
It exists to try methods against memorization on; it draws nothing useful.

**It was trained to be localizable**, by two terms of its loss: a memorized caption should use few of the
value neurons, and memorized and other captions should not use the same ones. A model that was
not trained so stands beside it below as the reference. It proves the mechanics of localization and pruning, not their
success on other models.

## Data

{scenes} procedural scenes with captions, and memorized pictures at the shares below. Template captions:
`prompts.csv`, type TM, {template_share} each; their layout is fixed and one part varies. `calibration.csv`
and `test.csv` hold ordinary captions that were not trained on by intent. `training_images/` holds the
memorized pictures, cropped to 64x64 pixels.

{pictures}

The weights and the drawn pictures are under Apache-2.0; the photographs keep the licences above (CC BY 2.0:
cropped and scaled).

Trained by `examples/demo_training/train.py {training}`. The autoencoder is from an earlier run of the same
script, whose scenes had three more colours and two more shapes. U-Net and autoencoder are stored in half
precision, the small text encoder in single precision.

## Figures

Measured by `examples/demo_training/measure.py` ({images} seeds, {steps} DDIM steps, guidance 3); all of them in
`figures.json`.

{described}
"""


if __name__ == "__main__":
    main()
