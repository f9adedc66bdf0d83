"""Small real pipelines: stock diffusers and transformers classes, random weights, a tiny tokenizer."""

import functools
import json
import os
import string
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import nemo_prune.cli
from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, demo_folder
from nemo_prune.models.source import load_pipeline
from nemo_prune.settings import LocalizationSettings, VerificationSettings

TEXT_WIDTH = 16

# Where the tiny pipeline computes: `cuda` tries the engine on a GPU. What a command loads takes a GPU by itself.
DEVICE = os.environ.get("NEMO_PRUNE_TEST_DEVICE", "cpu")

# Tests import `benchmarks`, which is not installed. At the end of the path: nemo_prune stays the installed package.
sys.path.append(str(Path(__file__).parent.parent))

# Tensors this small take longer to hand out to threads than to compute, and processes that run side by side with more
# threads than cores wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# Files that take longest, on the demo model or in processes of their own. They begin, so that no process of
# pytest-xdist is alone at the end.
LONGEST = (
    "test_demo", "test_cli", "test_gradient_search", "test_pursuit", "test_docs", "test_evidence_demo", "test_memory",
    "test_push", "test_evidence", "test_known_models", "test_screen", "test_ray", "test_reference",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; within a file they keep their order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """SD 1.x's three cross-attention down blocks of two attentions and its mid block, tiny."""
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (4, 4, 8, 8),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) * 3 + ("CrossAttnUpBlock2D",),
        "cross_attention_dim": TEXT_WIDTH,
        # As diffusers reads it: the number of heads.
        "attention_head_dim": 1,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of single characters."""
    characters = [c + end for c in string.printable if not c.isspace() for end in ("", "</w>")]
    vocabulary = [*characters, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


def tiny_pipeline(folder: Path, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of random weights."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "characters")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(text_config).eval(), tokenizer, tiny_unet(), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """A tiny pipeline; tests must leave it as they found it."""
    return tiny_pipeline(tmp_path_factory.mktemp("pipe")).to(DEVICE)


@pytest.fixture
def tiny(pipe: StableDiffusionPipeline) -> NoisePredictor:
    """The tiny pipeline on three seeds."""
    return NoisePredictor(pipe, LocalizationSettings(num_samples=3))


@pytest.fixture(scope="module")
def demo() -> NoisePredictor:
    """The demo model on three seeds."""
    pipe = load_pipeline(demo_folder(), "cpu", torch.float32)
    return NoisePredictor(pipe, LocalizationSettings(num_samples=3))


@pytest.fixture(scope="module")
def captions() -> tuple[list[str], list[str]]:
    """Three memorized captions of the demo model and some ordinary ones."""
    memorized = [prompt.text for prompt in read_prompts(demo_folder() / PROMPTS_FILE)]
    return memorized[:3], [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)][:8]


@pytest.fixture(scope="session")
def model_folder(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder; tests only read it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_images():
    """For tests that are not about images: few are drawn, in few steps, and no evidence is gathered."""
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(
            VerificationSettings,
            num_inference_steps=2,
            images_per_prompt=2,
            ordinary_images=1,
            cost_prompts=2,
            evidence_budget=0,
        )
        patch.setattr(nemo_prune.cli.run, "VerificationSettings", few)
        yield
