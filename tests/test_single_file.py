"""Single-file checkpoints, in and out: the names of diffusers' own conversion, the same bytes, every copy pruned."""

import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

from conftest import TEXT_WIDTH, tiny_unet
from nemo_prune.checkpoint import conversion
from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.ldm_names import ema_name, ldm_names, ldm_shape
from nemo_prune.checkpoint.single_file import check_single_file, write_single_file
from nemo_prune.cli import app
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.errors import ModelError, OutputError
from nemo_prune.facts import MaskFacts
from nemo_prune.files.json_values import to_json
from nemo_prune.mask import NeuronMask
from nemo_prune.models.source import find_again, load_pipeline, resolve_model
from nemo_prune.release.writing import staged_release
from nemo_prune.settings import LocalizationSettings

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
DOWN = "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v"
LDM_MID = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
LDM_DOWN = "model.diffusion_model.input_blocks.5.1.transformer_blocks.0.attn2.to_v.weight"
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nemo_prune" / "converted"


@pytest.fixture
def mask(model_folder, tmp_path):
    """A mask that was made for the folder."""
    found = NeuronMask({MID: torch.arange(8) % 5 == 1, DOWN: torch.arange(4) == 2})
    found.save(tmp_path / "mask.safetensors", MaskFacts(base_tensors=tensor_digests(scan_folder(model_folder), found)))
    return tmp_path / "mask.safetensors"


def as_single_file(folder, path, dtype=torch.float32, averages=False, others=None, metadata=None):
    """A single file of the folder, as a training run or another program may have left it."""
    write_single_file(scan_folder(folder), None, path)
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in load_file(path).items()}
    plain = [name for name in tensors if name.startswith("model.diffusion_model.")]
    if averages:
        tensors |= {ema_name(name): tensors[name] * 0.5 for name in plain}
    tensors |= others or {}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    else:
        save_file(tensors, path, metadata=metadata or {"format": "pt"})
    return path


def weights(folder):
    return {path.relative_to(folder).as_posix(): load_file(path) for path in Path(folder).rglob("*.safetensors")}


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def as_folder_names(folder, file):
    """The tensors of a single file, under the names and shapes that a folder has for them."""
    stored, found = load_file(file), {}
    for path, tensors in weights(folder).items():
        if path.split("/")[0] in PARTS:
            names = ldm_names(path.split("/")[0], tensors)
            found[path] = {name: stored[names[name]].reshape(tensors[name].shape) for name in tensors}
    return found


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


SD_V1 = {
    "unet": (UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768}),
    "vae": (
        AutoencoderKL,
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
    ),
}


@pytest.mark.parametrize("layers_per_block, num_blocks", [(None, None), (1, 2), (2, 3), (3, 4)])
def test_the_names_are_those_of_diffusers_own_conversion(layers_per_block, num_blocks):
    """Stable Diffusion v1's architecture and others; each tensor is told by its own shape or number."""
    if layers_per_block is None:
        with torch.device("meta"):
            unet, vae = (kind(**config) for kind, config in SD_V1.values())
    else:
        blocks = (4, 8, 8, 4)[:num_blocks]
        unet = tiny_unet(
            layers_per_block=layers_per_block,
            block_out_channels=blocks,
            down_block_types=("CrossAttnDownBlock2D",) * (num_blocks - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (num_blocks - 1),
        )
        vae = AutoencoderKL(
            block_out_channels=blocks,
            down_block_types=("DownEncoderBlock2D",) * num_blocks,
            up_block_types=("UpDecoderBlock2D",) * num_blocks,
            layers_per_block=layers_per_block,
            norm_num_groups=4,
        )
    converters = {
        "unet": (unet, single_file_utils.convert_ldm_unet_checkpoint),
        "vae": (vae, single_file_utils.convert_ldm_vae_checkpoint),
    }
    for component, (model, convert) in converters.items():
        state = model.state_dict()
        names = ldm_names(component, state)
        assert len(set(names.values())) == len(state)
        file = {names[name]: state[name].reshape(ldm_shape(names[name], tuple(state[name].shape))) for name in state}
        back = convert(dict(file), model.config)
        assert back.keys() == state.keys()
        for name in state:
            # A view of the same storage, or on the meta device the same tensor's view.
            assert back[name].shape == state[name].shape
            assert back[name].is_meta or back[name].data_ptr() == state[name].data_ptr(), name


def test_the_names_of_older_folders_and_of_the_text_encoder():
    text = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    names = [f"text_model.{name.removeprefix('text_model.')}" for name in text.state_dict()]
    assert single_file_utils.CHECKPOINT_KEY_NAMES["clip"] in ldm_names("text_encoder", names).values()
    assert single_file_utils.convert_ldm_clip_checkpoint(dict.fromkeys(ldm_names("text_encoder", names).values())) == (
        dict.fromkeys(names)
    )
    old = [f"decoder.mid_block.attentions.0.{part}.weight" for part in ("query", "key", "value", "proj_attn")]
    new = [f"decoder.mid_block.attentions.0.{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    assert list(ldm_names("vae", old).values()) == list(ldm_names("vae", new).values())
    with pytest.raises(ModelError, match="class_embedding"):
        ldm_names("unet", ["class_embedding.weight"])
    with pytest.raises(ModelError, match="no place of its own"):
        ldm_names("vae", [old[0], new[0]])


def test_a_folder_becomes_a_file_that_stock_diffusers_loads_and_a_folder_again(pipe, model_folder, tmp_path, cache):
    file = tmp_path / "model.safetensors"
    write_single_file(scan_folder(model_folder), None, file)
    stock = StableDiffusionPipeline.from_single_file(str(file), config=str(model_folder), local_files_only=True)
    assert torch.equal(image(stock), image(pipe))
    source = resolve_model(str(file), config=str(model_folder))
    assert torch.equal(image(load_pipeline(source.folder, "cpu", torch.float32)), image(pipe))
    unprefixed = {
        name: {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
        for name, tensors in weights(source.folder).items()
    }
    assert unprefixed.keys() == weights(model_folder).keys()
    assert all(equal(tensors, unprefixed[name]) for name, tensors in weights(model_folder).items())
    assert str(tmp_path) not in json.dumps(to_json(source.facts)) and "single-file" in source.facts.converted
    # It is made once; where it is lost, another worker makes it again.
    made = (source.folder / "conversion.json").stat().st_mtime_ns
    assert resolve_model(str(file), config=str(model_folder)) == source and find_again(source) == source
    assert (source.folder / "conversion.json").stat().st_mtime_ns == made
    shutil.rmtree(cache)
    assert find_again(source) == source and source.folder.is_dir()


def test_a_conversion_that_is_cut_off_leaves_nothing_and_the_next_one_is_whole(
    model_folder, tmp_path, cache, monkeypatch
):
    file = tmp_path / "model.safetensors"
    write_single_file(scan_folder(model_folder), None, file)
    written = []

    def cut_off(path, tensors):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        conversion_write(path, tensors)

    conversion_write = conversion.write_tensors
    monkeypatch.setattr(conversion, "write_tensors", cut_off)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(file), config=str(model_folder))
    assert [path for path in cache.rglob("*") if path.suffix != ".lock"] == []
    assert len(weights(resolve_model(str(file), config=str(model_folder)).folder)) == 3


@pytest.mark.parametrize(
    "form, dtype",
    [(form, dtype) for form in ("folder", ".safetensors") for dtype in (torch.float32, torch.float16)]
    + [(".ckpt", torch.float16)],
)
def test_folder_and_file_of_one_base_and_mask_agree_tensor_by_tensor(model_folder, mask, tmp_path, form, dtype):
    if form == "folder":
        base, config = tmp_path / "base", ()
        shutil.copytree(model_folder, base)
        for path, tensors in weights(base).items():
            changed = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
            save_file(changed, base / path, {"format": "pt"})
    else:
        base, config = as_single_file(model_folder, tmp_path / f"base{form}", dtype), ("--config", model_folder)
    before = base.read_bytes() if base.is_file() else weights(base)
    outs = tmp_path / "out", tmp_path / "out.safetensors"
    for out in outs:
        # The mask was made on the folder in float32: it fits all of them.
        result = command("export", "--model", base, *config, "--mask", mask, "--out", out)
        assert result.exit_code == 0, result.output
    folder, file = outs
    pruned = weights(folder)
    assert pruned["unet/diffusion_pytorch_model.safetensors"][f"{MID}.weight"].dtype == dtype
    for path, tensors in as_folder_names(folder, file).items():
        assert equal(tensors, pruned[path])
    neurons = NeuronMask.load(mask)
    for layer, rows in neurons.layers.items():
        tensor = pruned["unet/diffusion_pytorch_model.safetensors"][f"{layer}.weight"]
        assert (tensor[rows] == 0).all() and (tensor[~rows] != 0).any(dim=1).all()
    beside = file.with_suffix(".nemo_prune")
    record = json.loads((beside / "nemo_prune.json").read_text())
    assert record["files"]["rows_changed"] == {file.name: neurons.num_neurons}
    assert list(record["files"]["sha256"]) == [file.name]
    assert (beside / "mask.safetensors").read_bytes() == mask.read_bytes()
    assert str(tmp_path) not in json.dumps(record)
    assert {path.name for path in beside.iterdir()} >= {"README.md", "nemo_prune.json", "mask.safetensors"}
    assert all(path.is_file() for path in beside.iterdir())
    # The base is only read.
    assert base.read_bytes() == before if base.is_file() else all(map(equal, weights(base).values(), before.values()))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_copy_of_a_file_is_patched_in_place_with_its_averages_and_all_else_is_the_same(
    model_folder, mask, tmp_path
):
    others = {"lora_unet_x.alpha": torch.ones(3), "cond_stage_model.logit_scale": torch.ones(())}
    base = as_single_file(
        model_folder, tmp_path / "base.safetensors", averages=True, others=others, metadata={"note": "trained by me"}
    )
    out = tmp_path / "out.safetensors"
    result = command("export", "--model", base, "--config", model_folder, "--mask", mask, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    before, after = load_file(base), load_file(out)
    rows = {LDM_MID: [1, 6], LDM_DOWN: [2]}
    for name in list(rows):
        rows[ema_name(name)] = rows[name]
        assert before[ema_name(name)][rows[name]].any() and not after[ema_name(name)][rows[name]].any()
    for name, indices in rows.items():
        before[name][indices] = 0
    assert equal(before, after)
    with safe_open(out, "pt") as file:
        assert file.metadata().keys() == {"nemo_prune"}
    size = sum(len(indices) for indices in rows.values()) * TEXT_WIDTH * 4
    data = [content[8 + int.from_bytes(content[:8], "little") :] for content in (base.read_bytes(), out.read_bytes())]
    assert 0 < sum(a != b for a, b in zip(*data, strict=True)) <= size
    files = json.loads(result.stdout)["files"]
    assert files["rows_changed"] == {out.name: 6} and files["left_out"] == {}
    assert "3 of the 6 rows are of averages" in " ".join(files["notes"])
    shown = json.loads(command("diff", base, out, "--json").stdout)
    assert shown["unexpected"] == 0
    assert {each["layer"] for each in shown["differences"] if each["what"] == "rows"} == {
        f"{MID}.weight",
        f"{DOWN}.weight",
    }
    # As a folder the averages are left out, and the record says so.
    result = command("export", "--model", base, "--config", model_folder, "--mask", mask, "--out", tmp_path / "folder")
    left_out = json.loads((tmp_path / "folder" / "nemo_prune.json").read_text())["files"]["left_out"]
    assert "moving averages" in left_out["model_ema.*"] and left_out["lora_unet_x.alpha"]


def test_a_masked_layers_average_of_another_size_is_refused(model_folder, mask, tmp_path):
    others = {ema_name(LDM_MID): torch.ones(3, 2)}
    base = as_single_file(model_folder, tmp_path / "base.safetensors", others=others)
    result = command(
        "export", "--model", base, "--config", model_folder, "--mask", mask, "--out", tmp_path / "out.safetensors"
    )
    assert result.exit_code == 1 and "8 neurons" in result.stderr and not (tmp_path / "out.safetensors").exists()


def test_suppressing_equals_the_file_to_the_last_bit(pipe, model_folder, mask, tmp_path):
    out = tmp_path / "out.safetensors"
    assert command("export", "--model", model_folder, "--mask", mask, "--out", out).exit_code == 0
    stock = StableDiffusionPipeline.from_single_file(str(out), config=str(model_folder), local_files_only=True)
    live, stored = (NoisePredictor(each, LocalizationSettings(num_samples=2)) for each in (pipe, stock))
    latents = live.initial_latents()
    suppressed = live.predict_noise(latents, live.encode(["a cat"])[0], [NeuronMask.load(mask)])
    assert torch.equal(suppressed, stored.predict_noise(latents, stored.encode(["a cat"])[0]))


def test_a_text_encoder_without_its_prefix_is_read_and_left_so(model_folder, mask, tmp_path):
    base = as_single_file(model_folder, tmp_path / "base.safetensors")
    short = {
        name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in load_file(base).items()
    }
    save_file(short, base)
    out = tmp_path / "out.safetensors"
    result = command("export", "--model", base, "--config", model_folder, "--mask", mask, "--out", out)
    assert result.exit_code == 0, result.output
    assert load_file(out).keys() == short.keys()


class _Malware:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.slow
def test_a_pickle_runs_nothing_and_the_trainers_objects_do_no_harm(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = as_single_file(model_folder, tmp_path / "model.ckpt")
    tensors = torch.load(file, weights_only=True)["state_dict"]
    expected = weights(resolve_model(str(file), config=str(model_folder)).folder)
    # As Lightning wrote it: a class of its own as a key, and an object of it; the class is not to be had here.
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    trainer = {name: types.ModuleType(name) for name in names}
    kind = type("ModelCheckpoint", (), {"__module__": names[-1]})
    trainer[names[-1]].ModelCheckpoint = kind
    for zipped in (True, False):
        with monkeypatch.context() as patch:
            for name, module in trainer.items():
                patch.setitem(sys.modules, name, module)
            # What a pickle needs is known beforehand in the newer format alone; there NumPy's numbers are harmless too.
            best = np.float64(1) if zipped else 1
            state = {"state_dict": tensors, "callbacks": {kind: {"best": best}}, "object": kind()}
            torch.save(state, file, _use_new_zipfile_serialization=zipped)
        found = weights(resolve_model(str(file), config=str(model_folder)).folder)
        assert all(equal(found[name], expected[name]) for name in expected)
    # A flat dict is a checkpoint too.
    torch.save(tensors, file)
    assert len(weights(resolve_model(str(file), config=str(model_folder)).folder)) == 3
    for state in ({"state_dict": tensors, "x": _Malware()}, _Malware()):
        torch.save(state, file)
        with pytest.raises(ModelError, match=r"mkdir.*malware"):
            resolve_model(str(file), config=str(model_folder))
    file.write_bytes(pickle.dumps(_Malware(), protocol=2))
    with pytest.raises(ModelError):
        resolve_model(str(file), config=str(model_folder))
    assert not (tmp_path / "ran").exists()
    for content in ({"a": 1}, [torch.ones(1)]):
        torch.save(content, file)
        with pytest.raises(ModelError, match="no named tensors"):
            resolve_model(str(file), config=str(model_folder))


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda tensors: tensors.update({"conditioner.embedders.0.x": torch.ones(1)}), "SDXL"),
        (lambda tensors: tensors.update({"cond_stage_model.model.x": torch.ones(1)}), "2.x"),
        (
            lambda tensors: tensors.pop("first_stage_model.decoder.conv_in.bias"),
            "first_stage_model.decoder.conv_in.bias",
        ),
        (lambda tensors: tensors.update({LDM_MID: torch.ones(8, 17)}), r"\[8, 17\]"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("first_stage")], "no VAE"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith("cond")], "no U-Net"),
    ],
)
def test_a_file_that_is_no_whole_checkpoint_of_this_architecture_is_a_named_error(model_folder, tmp_path, change, word):
    file = as_single_file(model_folder, tmp_path / "model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=word):
        resolve_model(str(file), config=str(model_folder))


@pytest.mark.slow
def test_wrong_names_and_options_are_named_errors(model_folder, mask, tmp_path):
    file = as_single_file(model_folder, tmp_path / "model.safetensors")
    export = ["export", "--mask", mask, "--out"]
    base = ["--model", file, "--config", model_folder]
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty").mkdir()
    for arguments, word in (
        ([*export, tmp_path / "out.ckpt", *base], "pickle"),
        ([*export, tmp_path / "folder.safetensors", *base], "is a folder"),
        ([*export, file, *base, "--overwrite"], "the model itself"),
        ([*export, tmp_path / "out", *base, "--variant", "fp16"], "fp16"),
        ([*export, tmp_path / "out", "--model", model_folder, "--config", model_folder], "--config"),
        ([*export, tmp_path / "out", "--model", tmp_path / "nowhere.safetensors"], "no single file"),
        ([*export, tmp_path / "out", "--model", file, "--config", tmp_path / "empty"], "model_index.json"),
        ([*export, tmp_path, *base, "--overwrite"], "is inside"),
        (["run", "--out", tmp_path / "out.safetensors", "--model", "demo"], "different lengths"),
    ):
        result = command(*arguments)
        assert result.exit_code == 1 and word in result.stderr, result.output
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a valid safetensors" in command(*export, tmp_path / "out", *base).stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.ckpt").exists()


@pytest.mark.slow
def test_an_old_release_stays_until_the_new_one_is_whole(model_folder, mask, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    export = ["export", "--model", model_folder, "--mask", mask, "--out", out]
    assert command(*export).exit_code == 0
    first = {path: path.read_bytes() for path in (out, out.with_suffix(".nemo_prune") / "nemo_prune.json")}
    assert "--overwrite" in command(*export).stderr
    with pytest.raises(KeyboardInterrupt), staged_release(out, overwrite=True) as release:
        release.layout.file.touch()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(
            "nemo_prune.release.writing.os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no space"))
        )
        result = command(*export, "--overwrite", "--scale", -1)
    assert result.exit_code == 1 and "no space" in result.stderr
    assert {path: path.read_bytes() for path in first} == first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert command(*export, "--overwrite", "--scale", -1).exit_code == 0
    assert all(path.read_bytes() != content for path, content in first.items())
    # A kill between the two: the folder is there, the file is not. The same command ends well.
    os.replace(out, tmp_path / f".{out.name}.partial")
    assert command(*export).exit_code == 0
    assert {path: path.read_bytes() for path in first} == first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_that_is_not_the_folder_is_found_out(model_folder, tmp_path):
    file = tmp_path / "model.safetensors"
    write_single_file(scan_folder(model_folder), None, file)
    check_single_file(file, scan_folder(model_folder), None)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(OutputError, match="is not what the pruned folder holds"):
        check_single_file(file, scan_folder(model_folder), None)
