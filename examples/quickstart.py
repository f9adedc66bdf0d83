"""From Python: prune the demo model against one caption, then use the mask in a live pipeline.

    python examples/quickstart.py pruned/

All names come from `nemo_prune` itself. It takes about 40 seconds of one CPU core.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import StableDiffusionPipeline

from nemo_prune import (
    Listener,
    NeuronMask,
    OrdinaryCaptions,
    Plan,
    VerificationSettings,
    apply_mask,
    memorized_captions,
    ordinary_captions,
    prune_model,
    read_corpus,
    resolve_model,
)


class Printed(Listener):
    """Prints the stages and the messages of a run, which itself prints nothing."""

    @contextmanager
    def stage(self, stage) -> Iterator:
        print(f"{stage.label} ...")
        with super().stage(stage) as advance:
            yield advance

    def say(self, text: str) -> None:
        print(text)


def main(out: Path) -> None:
    """Run the stages from a model and captions to a release, and compare an image with and without the mask."""
    # With your own model: resolve_model("my-model/"), read_corpus("captions.csv"), OrdinaryCaptions(texts).
    source = resolve_model("demo")
    corpus = read_corpus(memorized_captions("demo"), limit=1)
    # 60 ordinary captions keep this example quick; hundreds are better.
    ordinary = OrdinaryCaptions(ordinary_captions("demo").texts[:60])
    verification = VerificationSettings(ordinary_images=1, cost_prompts=4, num_inference_steps=10, evidence_budget=0)

    result = prune_model(source, corpus, ordinary, Plan(out=out, verification=verification), Printed())
    print(f"{result.record.mask.num_neurons} neurons pruned. Model: {result.out}. Report: {result.report}")

    # The mask also works in a live pipeline of the unpruned model; nothing is written.
    pipe = StableDiffusionPipeline.from_pretrained(source.folder)
    mask = NeuronMask.load(result.mask)
    (caption,) = corpus.texts
    with apply_mask(pipe, mask):
        image = pipe(caption, num_inference_steps=10, guidance_scale=source.guidance_scale).images[0]
    image.save(result.report.with_name("live.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
