"""Draw README's picture: what the demo model draws for six of its captions before and after pruning.

After a run on the demo it takes half a minute on two CPU cores:

    nemo-prune run --model demo --out pruned/
    python -m examples.demo_training.picture pruned/ --out examples/before_after.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.models.demo import demo_folder
from nemo_prune.models.known import DEMO, memorized_captions
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.drawing import Drawing, draw
from nemo_prune.proof.images import save_grid

SHOWN = ("astronaut", "dahlia", "balloon", "sailboat", "rocket", "sofa_yellow")
DRAWING = Drawing(guidance_scale=DEMO.guidance_scale)
SEEDS = range(2, 6)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pruned", type=Path, help="folder of the demo as it was released")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    arguments = parser.parse_args()
    show(arguments.pruned, arguments.out)


def show(pruned: Path, out: Path, drawing: Drawing = DRAWING) -> None:
    """Write one row a caption: its training image, four seeds of the demo, a gap, the same seeds of the pruned model.

    Args:
        pruned: folder of the pruned model.
        out: PNG file of 256 colours.
        drawing: how images are drawn.
    """
    pipes = [load_pipeline(folder, "cpu", torch.float32) for folder in (demo_folder(), pruned)]
    captions = {prompt.image.stem: prompt for prompt in read_prompts(memorized_captions("demo")) if prompt.image}
    rows = []
    for caption in (captions[name] for name in SHOWN):
        before, after = (draw(pipe, caption.text, drawing, SEEDS) for pipe in pipes)
        rows.append([Image.open(caption.image), *before, None, *after])
    save_grid(out, rows)
    Image.open(out).quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
