import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from benchmarks.kills import files_of
from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.errors import MaskError, ModelError, OutputError
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.staging import check_target, staged_folder
from nemo_prune.mask import NeuronMask
from nemo_prune.settings import LocalizationSettings

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def mask(pipe):
    sizes = NoisePredictor(pipe, LocalizationSettings()).sizes
    generator = torch.Generator().manual_seed(0)
    return NeuronMask({name: torch.rand(size, generator=generator) < 0.4 for name, size in sizes.items()})


def export(base, mask, folder):
    folder.mkdir()
    return export_checkpoint(base, mask, folder)


def assert_only_masked_rows_differ(base, pruned, mask):
    before, after = load_file(base), load_file(pruned)
    assert list(before) == list(after)
    for name, tensor in before.items():
        expected = tensor.clone()
        layer = name.removesuffix(".weight").removesuffix(".bias")
        if layer in mask.layers:
            expected[mask.layers[layer]] = 0
        assert torch.equal(after[name], expected) and after[name].dtype == tensor.dtype


def test_the_export_differs_in_the_masked_rows_alone_and_the_source_is_untouched(model_folder, mask, tmp_path):
    before = files_of(model_folder)
    report = export(model_folder, mask, tmp_path / "out")
    assert files_of(model_folder) == before
    assert_only_masked_rows_differ(model_folder / WEIGHTS, tmp_path / "out" / WEIGHTS, mask)
    after = files_of(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {WEIGHTS}
    assert report.sha256 == after
    assert report.base_sha256 == {WEIGHTS: before[WEIGHTS]}
    assert report.rows_changed == {WEIGHTS: mask.num_neurons}


def test_suppressing_equals_the_exported_file_to_the_last_bit(pipe, model_folder, mask, tmp_path):
    export(model_folder, mask, tmp_path / "out")
    settings = LocalizationSettings(num_samples=2)
    stored = NoisePredictor(DiffusionPipeline.from_pretrained(tmp_path / "out"), settings)
    live = NoisePredictor(pipe, settings)
    latents = live.initial_latents()
    for text in ("a cat", ""):
        suppressed = live.predict_noise(latents, live.encode([text])[0], [mask])
        assert torch.equal(suppressed, stored.predict_noise(latents, stored.encode([text])[0]))


def test_shards_and_half_precision_variants_are_all_patched(pipe, mask, tmp_path):
    base = tmp_path / "base"
    pipe.save_pretrained(base)
    pipe.unet.save_pretrained(base / "unet", max_shard_size="60KB")
    (base / WEIGHTS).unlink(missing_ok=True)
    half = {name: tensor.half() for name, tensor in pipe.unet.state_dict().items()}
    save_file(half, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    report = export(base, mask, tmp_path / "out")
    assert len(report.rows_changed) > 2
    for path in (base / "unet").glob("*.safetensors"):
        assert_only_masked_rows_differ(path, tmp_path / "out" / "unet" / path.name, mask)


def test_unpatched_twins_and_foreign_files_stay_behind_and_links_are_copied(model_folder, mask, tmp_path):
    base = tmp_path / "models--a--b" / "snapshots" / "commit"
    shutil.copytree(model_folder, base)
    real = tmp_path / "models--a--b" / "blob"
    shutil.move(base / WEIGHTS, real)
    (base / WEIGHTS).symlink_to(real)
    blob_hash = file_hash(real)
    for name in ("unet/model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors", "holiday.png", "LICENSE"):
        (base / name).write_bytes(b"x")
    report = export(base, mask, tmp_path / "out")
    assert file_hash(real) == blob_hash and not (tmp_path / "out" / WEIGHTS).is_symlink()
    named = ["unet/diffusion_pytorch_model.non_ema.safetensors", "unet/model.bin"]
    assert list(report.left_out) == [*named, "*.png"]
    assert "average" in report.left_out["unet/diffusion_pytorch_model.non_ema.safetensors"]
    assert "not safetensors" in report.left_out["unet/model.bin"]
    assert (tmp_path / "out" / "LICENSE").exists() and not (tmp_path / "out" / "holiday.png").exists()


def test_biases_lose_their_elements(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    (base / "unet").mkdir(parents=True)
    out.mkdir()
    (base / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    save_file({"a.to_v.weight": torch.ones(3, 2), "a.to_v.bias": torch.ones(3)}, base / WEIGHTS)
    mask = NeuronMask({"a.to_v": torch.tensor([True, False, True])})
    export_checkpoint(base, mask, out)
    assert_only_masked_rows_differ(base / WEIGHTS, out / WEIGHTS, mask)


def test_weights_that_can_not_be_patched_are_refused(model_folder, mask, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    content = (base / WEIGHTS).read_bytes()
    for damaged in (content[:100], b"\xff" * 64, content[:-500]):
        (base / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ModelError, match="not a valid safetensors"):
            export_checkpoint(base, mask, tmp_path)
    (base / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        export_checkpoint(base, mask, tmp_path)


def test_a_mask_of_another_model_is_refused_before_anything_is_written(model_folder, tmp_path):
    for name, size in (("nowhere.to_v", 8), ("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 9)):
        with pytest.raises(MaskError, match=name):
            export(model_folder, NeuronMask({name: torch.ones(size, dtype=torch.bool)}), tmp_path / name)
        assert not any((tmp_path / name).iterdir())


def test_a_failure_leaves_nothing_and_the_old_folder_in_place(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(RuntimeError), staged_folder(out, overwrite=True) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "old").exists()
    with staged_folder(out, overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_behind_is_cleared_and_the_old_folder_comes_back(tmp_path):
    out = tmp_path / "out"
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with pytest.raises(RuntimeError), staged_folder(out, overwrite=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "file").exists()


def test_a_target_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError):
            check_target(target)
    check_target(tmp_path, overwrite=True)
    check_target(tmp_path / "new" / "folder")


def test_hidden_folders_and_cards_are_not_copied(model_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "unet" / ".cache").mkdir()
    (base / "unet" / ".cache" / "x.json").touch()
    (base / "README.md").touch()
    copied = {path.as_posix() for path in scan_folder(base).kept}
    assert WEIGHTS in copied and "README.md" not in copied
    assert not any(".cache" in name for name in copied)


@pytest.mark.slow
def test_stock_diffusers_generates_from_the_export_without_our_package(model_folder, mask, tmp_path):
    export(model_folder, mask, tmp_path / "out")
    program = (
        "import sys; sys.modules['nemo_prune'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert pipe('a cat', num_inference_steps=2).images[0].size == (64, 64)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
