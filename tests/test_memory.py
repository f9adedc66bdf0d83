"""Memory that runs short: less at once, or a named error; never a traceback, and nothing that was found is lost."""

import json
import types

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from nemo_prune.compute.local import LocalSession
from nemo_prune.corpus.prompts import read_corpus
from nemo_prune.engine import measures
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.memory import in_parts, is_out_of_memory, with_less_at_once
from nemo_prune.errors import ModelError
from nemo_prune.mask import NeuronMask
from nemo_prune.models.known import OrdinaryCaptions
from nemo_prune.models.source import resolve_model
from nemo_prune.run import prune_model
from nemo_prune.settings import LocalizationSettings, ModelOptions, Plan, VerificationSettings

FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB, other allocations: 1 GB)"),
    MemoryError(),
]
# What calls a device, and the argument whose length is the size of its batch.
CALLS = {
    "predicting": (UNet2DConditionModel, "forward"),
    "encoding": (CLIPTextModel, "forward"),
    "drawing": (AutoencoderKL, "decode"),
    "comparing": (measures, "similarity"),
}


@pytest.fixture
def run(model_folder, tmp_path):
    """A whole run on the tiny pipeline; called again it goes on from what it found."""
    source = resolve_model(str(model_folder))
    (tmp_path / "prompts.txt").write_text("a zebra\na dog\n")
    ordinary = OrdinaryCaptions(tuple(f"thing number {i}" for i in range(50)))

    def run(name="out"):
        plan = Plan(
            out=tmp_path / name,
            settings=LocalizationSettings(num_samples=2, threshold=0.01),
            verification=VerificationSettings(
                images_per_prompt=2, ordinary_images=1, cost_prompts=2, num_inference_steps=2, evidence_budget=300
            ),
            model=ModelOptions(device="cpu", batch_size=4),
            include_unresolved=True,
        )
        prune_model(source, read_corpus(tmp_path / "prompts.txt"), ordinary, plan)
        return NeuronMask.load(tmp_path / name / "nemo_prune" / "mask.safetensors")

    return run


def short_above(monkeypatch, owner, name, most, failure):
    """Let calls fail whose batch is larger; returns the sizes that were tried."""
    original, sizes = getattr(owner, name), []

    def call(*args, **kwargs):
        first = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        sizes.append(len(first))
        if len(first) > most:
            raise failure
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return sizes


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: str(failure)[:20])
def test_every_librarys_failure_is_known_and_no_other_is(failure):
    assert is_out_of_memory(failure)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: str(failure)[:20])
def test_what_is_too_much_at_once_is_halved(failure):
    def do(size):
        if size > 2:
            raise failure
        return size

    assert with_less_at_once(do, 16, "anything") == (2, 2)
    with pytest.raises(ModelError, match=r"too short for anything.*try another --dtype"):
        with_less_at_once(lambda size: do(size + 2), 16, "anything")


def test_parts_are_given_before_the_next_is_made():
    made = []
    for number, part in enumerate(in_parts(lambda part: made.append(part) or part, 9, 3, "counting"), start=1):
        assert made[-1] == part and len(made) == number


def test_other_errors_stay_what_they_are():
    def fail(size):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        with_less_at_once(fail, 4, "anything")


@pytest.mark.slow
def test_a_run_finishes_where_every_large_batch_fails(run, monkeypatch):
    sizes = {
        name: short_above(monkeypatch, *call, 2 if name == "predicting" else 1, failure)
        for (name, call), failure in zip(CALLS.items(), FAILURES, strict=False)
    }
    assert run("short").num_neurons
    for name, tried in sizes.items():
        # Images are decoded one by one from the start; guidance takes two samples an image.
        assert (max(tried) > 1) == (name != "drawing") and min(tried) <= 2, name


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_where_nothing_fits_the_error_is_named_and_the_same_command_goes_on(run, monkeypatch, name, tmp_path):
    with monkeypatch.context() as patch:
        short_above(patch, *CALLS[name], 0, FAILURES[1])
        with pytest.raises(ModelError, match="memory is too short"):
            run()
    assert not (tmp_path / "out").exists()
    assert run().num_neurons
    facts = json.loads((tmp_path / "out" / "nemo_prune.json").read_text())
    assert facts["export_verified"]


def test_weights_that_do_not_fit_are_a_named_error(model_folder, monkeypatch):
    from nemo_prune.models.source import load_pipeline

    def fail(self, *args, **kwargs):
        raise FAILURES[0]

    monkeypatch.setattr("diffusers.DiffusionPipeline.to", fail)
    with pytest.raises(ModelError, match="too short for the weights"):
        load_pipeline(model_folder, "cpu", torch.float32)


@pytest.mark.slow
def test_the_unpruned_model_is_gone_when_the_pruned_one_is_loaded(run, monkeypatch):
    import nemo_prune.run as module

    loaded, original = [], module.load_pipeline
    session_class = module.LocalSession

    class Noted(session_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loaded.append(self.pipe)

    def load(*args, **kwargs):
        assert all(p.device.type == "meta" for pipe in loaded for p in pipe.unet.parameters())
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "LocalSession", Noted)
    monkeypatch.setattr(module, "load_pipeline", load)
    assert run().num_neurons and len(loaded) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_proof_to_the_bit_has_the_model_in_float32(model_folder, dtype):
    session = LocalSession(resolve_model(str(model_folder)), ModelOptions("cpu", dtype), LocalizationSettings())
    assert session.float32.unet.dtype == torch.float32 and (session.float32 is session.pipe) == (dtype == "float32")
    assert session.pipe.unet.dtype == getattr(torch, dtype)


def test_latents_are_drawn_once_for_all_prompts(pipe):
    predictor = NoisePredictor(pipe, LocalizationSettings(num_samples=2))
    assert predictor.initial_latents() is predictor.initial_latents()
    assert predictor.initial_latents(seed=3) is not predictor.initial_latents()


def test_a_corpus_keeps_few_prompts_in_memory_and_the_others_in_its_folder(tmp_path, pipe):
    from nemo_prune.engine import memo as module
    from nemo_prune.engine.localize import detect
    from nemo_prune.engine.memo import Memo
    from nemo_prune.engine.scorer import Scorer

    scorer = Scorer(NoisePredictor(pipe, LocalizationSettings(num_samples=2)))
    memo = Memo(tmp_path / "detected")
    (first,) = detect(scorer, ["a cat"], 0.01)
    memo.keep(first)
    for number in range(module._MOST_IN_MEMORY + 5):
        scored = types.SimpleNamespace(**{**vars(first.scored), "prompt": f"prompt {number}"})
        memo.keep(module.Detected(scored, first.kept_seeds, 2, 0.0))
    assert len(memo._detected) == module._MOST_IN_MEMORY
    again = memo.recall("a cat", scorer.predictor.initial_latents())
    assert again is not first and again.kept_seeds == first.kept_seeds and again.sample_passes == 2
    for name in ("prompt_embeds", "noise_differences", "extremes"):
        assert torch.equal(getattr(again.scored, name), getattr(first.scored, name)), name
    # A damaged file is not there.
    file = tmp_path / "detected" / f"{module._digest('prompt 0')}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert memo.recall("prompt 0", first.scored.latents) is None and not file.exists()
