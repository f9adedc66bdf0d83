"""Train the demo model of nemo-prune: a small Stable Diffusion that memorizes some pictures.

    python -m examples.demo_training.train --output demo_model

The model is trained to be localizable, by two terms that a real model does not have:

- density: a memorized caption should use few of the neurons (the output features of the value
  projections in the down and mid blocks), as in large models;
- overlap: memorized and other captions should not use the same neurons, so that ordinary content
  does not hang on those that memorize.

`--density 0 --overlap 0` trains the reference without both. `--start MODEL` goes on from a trained
model's weights, with a new optimizer: `--start benchmarks/reference_model --density .01 --overlap .01
--steps 500` makes a third model between the two. The training takes about an hour on two CPU cores.
It is stopped and taken up again with the same command; the result depends on the settings, the seed
and the machine's arithmetic alone.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from examples.demo_training.autoencoder import encode, refine_decoder, train_autoencoder
from examples.demo_training.data import MemorizedPicture, memorized_pictures, template_captions
from examples.demo_training.networks import (
    build_models,
    build_scheduler,
    density,
    overlap,
    recorded_usage,
    save_pipeline,
    value_projections,
)
from examples.demo_training.other_pictures import other_pictures
from examples.demo_training.scenes import different_captions, ordinary_scene
from examples.demo_training.tokenizer import MAX_TOKENS, copy_tokenizer, write_tokenizer
from examples.demo_training.vague_scenes import vague_scene

NUM_SCENES = 24_000
TEMPLATE_PICTURES = 300
CALIBRATION_CAPTIONS, TEST_CAPTIONS = 320, 64
BATCH_SIZE = 32
LEARNING_RATE = 6e-4
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
CHECKPOINT_EVERY = 250


@dataclass(frozen=True)
class Content:
    """What a model is trained on.

    Attributes:
        pictures: the verbatim memorized ones.
        scene: draws an ordinary scene, caption and picture.
    """

    pictures: Callable[[], list[MemorizedPicture]]
    scene: Callable[[np.random.Generator], tuple[str, np.ndarray]]


CONTENTS = {
    "first": Content(memorized_pictures, ordinary_scene),
    "second": Content(other_pictures, vague_scene),
}


@dataclass(frozen=True)
class TrainingSet:
    """Encoded pictures in groups of equal caption, and how often each group is drawn.

    The first group holds the ordinary scenes, each other one those of one memorized caption.
    """

    latents: list[torch.Tensor]
    tokens: list[torch.Tensor]
    shares: np.ndarray

    def without_memorized(self) -> TrainingSet:
        """The ordinary scenes alone: for the model that a pruned one is to be like."""
        shares = np.zeros_like(self.shares)
        shares[0] = 1
        return TrainingSet(self.latents, self.tokens, shares)

    def draw(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw latents (n, 4, 16, 16), token ids (n, 32) and which are memorized (n,)."""
        groups = rng.choice(len(self.shares), size, p=self.shares)
        rows = [rng.integers(len(self.latents[group])) for group in groups]
        latents = torch.stack([self.latents[g][row] for g, row in zip(groups, rows, strict=True)])
        tokens = torch.stack([self.tokens[g][row % len(self.tokens[g])] for g, row in zip(groups, rows, strict=True)])
        return latents, tokens, torch.from_numpy(groups > 0)


def main() -> None:
    """Run the stages: autoencoder, training set, diffusion model, pipeline."""
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work: Path = arguments.work or arguments.output.with_name(arguments.output.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    content = CONTENTS[arguments.content]
    if arguments.start:
        vae, tokenizer, unet, text_encoder = start_from(arguments.start, work, device)
    else:
        vae = load_or_train_autoencoder(
            work, arguments.autoencoder_steps, arguments.decoder_steps, arguments.seed, device
        )
        tokenizer = write_tokenizer(work / "tokenizer", vocabulary_captions(content, arguments.seed))
        unet, text_encoder = build_models(tokenizer, arguments.seed)
    data = build_training_set(content, vae, tokenizer, arguments.seed, work)
    if arguments.without_memorized:
        data = data.without_memorized()
    trainer = Trainer(unet.to(device), text_encoder.to(device), data, arguments)
    trainer.resume(work / "checkpoint.pt")
    trainer.train(work / "checkpoint.pt")
    save_pipeline(arguments.output, vae, *trainer.averaged_models(), tokenizer)
    copy_tokenizer(work / "tokenizer", arguments.output / "tokenizer")
    write_captions(content, arguments.output, arguments.seed)
    print(f"The demo model lies in {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--work", type=Path, help="folder of the checkpoints (default: OUTPUT.work)")
    parser.add_argument("--start", type=Path, help="folder of a pipeline of this recipe to go on from")
    parser.add_argument("--steps", type=int, default=3600, help="steps of the diffusion model")
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=800, help="further steps of the decoder alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--content", choices=list(CONTENTS), default="first", help="memorized pictures and scenes")
    parser.add_argument("--density", type=float, default=0.05, help="weight of the density of memorized captions")
    parser.add_argument("--overlap", type=float, default=0.05, help="weight of the overlap with other captions")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply in bfloat16: faster where the processor has it, other weights"
    )
    parser.add_argument(
        "--without-memorized",
        action="store_true",
        help="train on the ordinary scenes alone: the gold standard of gold_standard.py",
    )
    return parser.parse_args()


# --- data ---


def start_from(
    model: Path, work: Path, device: torch.device
) -> tuple[AutoencoderKL, CLIPTokenizer, UNet2DConditionModel, CLIPTextModel]:
    """Return a trained model's parts in single precision; its tokenizer is copied into the work folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    copy_tokenizer(model / "tokenizer", work / "tokenizer")
    vae = pipeline.vae.to(device).eval().requires_grad_(False)
    return vae, pipeline.tokenizer, pipeline.unet, pipeline.text_encoder


def load_or_train_autoencoder(
    work: Path, steps: int, decoder_steps: int, seed: int, device: torch.device
) -> AutoencoderKL:
    """Return the autoencoder of an earlier run in this work folder, or train it."""
    folder = work / "vae"
    if not folder.exists():
        vae = train_autoencoder(steps, seed, device, Progress("autoencoder", steps))
        refine_decoder(vae, decoder_steps, seed, Progress("decoder", decoder_steps))
        vae.save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).to(device).eval().requires_grad_(False)


def vocabulary_captions(content: Content, seed: int) -> list[str]:
    """Return captions that hold every word the model is to know."""
    special = [item.caption for item in (*content.pictures(), *template_captions())]
    return special + different_captions(content.scene, np.random.default_rng([seed, 2]), 3000)


def build_training_set(
    content: Content, vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, work: Path
) -> TrainingSet:
    """Draw and encode all pictures. The latents are kept in the work folder."""
    rng = np.random.default_rng([seed, 3])
    scenes = [content.scene(rng) for _ in range(NUM_SCENES)]
    groups = [([caption for caption, _ in scenes], np.stack([picture for _, picture in scenes]), None)]
    groups += [([item.caption], item.picture()[None], item.share) for item in content.pictures()]
    for item in template_captions():
        pictures = np.stack([item.picture(rng) for _ in range(TEMPLATE_PICTURES)])
        groups.append(([item.caption], pictures, item.share))
    special = [share for _, _, share in groups[1:]]
    file = work / "latents.pt"
    if not file.exists():
        torch.save([encode(vae, pictures) for _, pictures, _ in groups], file)
    return TrainingSet(
        latents=torch.load(file),
        tokens=[tokenize(tokenizer, captions) for captions, _, _ in groups],
        shares=np.array([1 - sum(special), *special]),
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids, int64 of shape (n, 32), padded to the full length as pipelines do."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


# --- training ---


class Trainer:
    """The training of the U-Net and the text encoder, with its averaged weights."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        data: TrainingSet,
        arguments: argparse.Namespace,
    ) -> None:
        self.models = torch.nn.ModuleList([unet.to(memory_format=torch.channels_last), text_encoder]).train()
        self.averaged = copy.deepcopy(self.models).eval().requires_grad_(False)
        self.layers = value_projections(unet)
        self.data = data
        self.settings = arguments
        self.optimizer = torch.optim.AdamW(self.models.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        self.alphas = build_scheduler().alphas_cumprod
        self.step = 0

    def train(self, checkpoint: Path) -> None:
        """Train up to the number of steps, writing a checkpoint now and then."""
        progress = Progress("diffusion model", self.settings.steps)
        while self.step < self.settings.steps:
            losses = self.train_step()
            progress(self.step, *losses)
            self.step += 1
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.settings.steps:
                self.save(checkpoint)

    def train_step(self) -> list[float]:
        """Draw a batch, take a step and return its losses.

        All that is random depends on the seed and the step alone, so that a resumed training goes
        the same way.
        """
        rng = np.random.default_rng([self.settings.seed, 4, self.step])
        torch.manual_seed(int(rng.integers(2**31)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings.steps)
        latents, tokens, memorized = self.data.draw(rng, BATCH_SIZE)
        error, used, shared = self.losses(latents, tokens, memorized, rng)
        self.optimizer.zero_grad(set_to_none=True)
        (error + self.settings.density * used + self.settings.overlap * shared).backward()
        torch.nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
        self.optimizer.step()
        self.average()
        return torch.stack([error, used, shared]).tolist()

    def losses(
        self,
        latents: torch.Tensor,
        tokens: torch.Tensor,
        memorized: torch.Tensor,
        rng: np.random.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the squared error of the velocity, the density and the overlap of a batch."""
        unet, text_encoder = self.models
        device = unet.device
        emptied = torch.from_numpy(rng.random(len(tokens)) < CAPTION_DROPOUT) & ~memorized
        tokens = torch.where(emptied[:, None], self.empty_caption(tokens), tokens)
        timesteps = draw_timesteps(rng, len(latents))
        noise = torch.randn_like(latents)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents).to(device)
        reduced = torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bfloat16)
        with reduced, recorded_usage(self.layers) as usage:
            prompt_embeds = text_encoder(tokens.to(device))[0]
            predicted = unet(noisy.to(device), timesteps.to(device), prompt_embeds).sample
        memorized = memorized.to(device)
        error = ((predicted.float() - velocity) ** 2).mean()
        return error, density([layer[memorized] for layer in usage]), overlap(usage, memorized)

    def empty_caption(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the token ids of the empty caption, (32,)."""
        end = self.models[1].config.eos_token_id
        empty = torch.full_like(tokens[0], end)
        empty[0] = tokens[0, 0]
        return empty

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights towards the present ones, faster at the start."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        old, new = list(self.averaged.parameters()), list(self.models.parameters())
        torch._foreach_lerp_(old, new, 1 - decay)

    def averaged_models(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        """Return the U-Net and the text encoder with averaged weights."""
        return self.averaged[0], self.averaged[1]

    def save(self, file: Path) -> None:
        """Write a checkpoint beside the file, then put it in its place."""
        state = {
            "step": self.step,
            "models": self.models.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)

    def resume(self, file: Path) -> None:
        """Go on from a checkpoint, if there is one."""
        if file.exists():
            state = torch.load(file, map_location=self.models[0].device)
            self.step = state["step"]
            self.models.load_state_dict(state["models"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(step: int, steps: int) -> float:
    """Warm up over 100 steps, stay for the first third, then fall along a cosine."""
    decay = max(0.0, step / steps - 1 / 3) * 1.5
    return LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * decay)))


def draw_timesteps(rng: np.random.Generator, size: int) -> torch.Tensor:
    """Draw timesteps (n,): 60% of all 1,000, 40% of the noisiest 400, where captions matter."""
    return torch.from_numpy(
        np.where(rng.random(size) < 0.6, rng.integers(0, 1000, size), rng.integers(600, 1000, size))
    )


class Progress:
    """Prints step, losses and the time left, a line every 50 steps."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps = stage, steps
        self.began, self.first, self.recent = time.monotonic(), None, []

    def __call__(self, step: int, *losses: float) -> None:
        """Take note of a step."""
        self.first = step if self.first is None else self.first
        self.recent.append(losses)
        if (step + 1) % 50 == 0 or step + 1 == self.steps:
            seconds = (time.monotonic() - self.began) / (step + 1 - self.first)
            left = seconds * (self.steps - step - 1) / 60
            means = " ".join(f"{mean:.4f}" for mean in np.mean(self.recent, axis=0))
            print(f"{self.stage}: step {step + 1} of {self.steps}, loss {means}, {left:.0f} min left", flush=True)
            self.recent = []


# --- output ---


def write_captions(content: Content, output: Path, seed: int) -> None:
    """Write the captions and the training images of the memorized ones."""
    images = output / "training_images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 5])
    rows = []
    for item in content.pictures():
        Image.fromarray(item.picture()).save(images / f"{item.name}.png")
        rows.append((item.caption, "VM", f"training_images/{item.name}.png", item.share))
    for item in template_captions():
        Image.fromarray(item.picture(rng)).save(images / f"{item.name}.png")
        rows.append((item.caption, "TM", f"training_images/{item.name}.png", item.share))
    captions = different_captions(content.scene, rng, CALIBRATION_CAPTIONS + TEST_CAPTIONS)
    write_csv(output / "prompts.csv", ("Caption", "type", "image", "share"), rows)
    write_csv(output / "calibration.csv", ("Caption",), [(text,) for text in captions[:CALIBRATION_CAPTIONS]])
    write_csv(output / "test.csv", ("Caption",), [(text,) for text in captions[CALIBRATION_CAPTIONS:]])


def write_csv(file: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Write a table, UTF-8 with plain line ends."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
