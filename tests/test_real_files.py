"""Folders as people have them: what is released, what is refused, and with which words."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.single_file import write_single_file
from nemo_prune.cli import app
from nemo_prune.facts import MaskFacts
from nemo_prune.mask import Neuron, NeuronMask

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3438167540\n"
MASK = NeuronMask.from_neurons([Neuron(MID, 1), Neuron(MID, 6)], {MID: 8})


@pytest.fixture
def base(model_folder, tmp_path):
    """A base of this test's own."""
    shutil.copytree(model_folder, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def mask(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    MASK.save(path, MaskFacts(base_tensors=tensor_digests(scan_folder(model_folder), MASK)))
    return path


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def export(base, mask, out, *options):
    return command("export", "--model", base, "--mask", mask, "--out", out, *options)


def refused(result, out, *words):
    """A named error with these words, and nothing is left."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def change_json(path, **changes):
    content = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            content.pop(name, None)
        else:
            content[name] = value
    path.write_text(json.dumps(content))


def change_tensors(path, change):
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})


# --- A: nothing unpruned leaves ---


@pytest.mark.parametrize("ending", [".bak", "~", ".tmp", ".orig", ".old.safetensors", ".1", ".safetensors_", ".part"])
def test_a_twin_of_the_weights_under_another_name_stays_behind_and_is_recorded(base, mask, tmp_path, ending):
    twin = (base / UNET).with_name(f"diffusion_pytorch_model.safetensors{ending}")
    shutil.copyfile(base / UNET, twin)
    assert export(base, mask, tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out" / "unet" / twin.name).exists()
    record = json.loads((tmp_path / "out" / "nemo_prune.json").read_text())
    assert any(place.startswith("unet/") for place in record["files"]["left_out"])
    assert command("diff", base, tmp_path / "out").exit_code == 0


def test_only_what_loaders_take_is_released_and_file_names_that_could_tell_something_are_counted(base, mask, tmp_path):
    for name in ("samples/a photo of ann.png", "logs/events.out", "unet/a photo of ann.png", "vae/notes.txt",
                 "train.py", "backup/unet.safetensors"):  # fmt: skip
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"x")
    with zipfile.ZipFile(base / "unet" / "weights.zip", "w") as archive:
        archive.write(base / UNET)
    shutil.copytree(base / "unet", base / "unet_ema")
    assert export(base, mask, tmp_path / "out").exit_code == 0
    released = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {path.split("/")[0] for path in released} == {
        "README.md", "model_index.json", "nemo_prune.json", "nemo_prune", "scheduler", "text_encoder", "tokenizer",
        "unet", "vae",
    }  # fmt: skip
    assert {path for path in released if path.startswith("unet/")} == {"unet/config.json", UNET}
    text = (tmp_path / "out" / "nemo_prune.json").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert "ann" not in text.replace("channel", "").replace("annot", "") and "unet/*.zip" in text
    assert "another folder/*.safetensors" in text


def test_a_second_unet_of_the_index_is_refused(base, mask, tmp_path):
    shutil.copytree(base / "unet", base / "unet_ema")
    change_json(base / "model_index.json", unet_ema=["diffusers", "UNet2DConditionModel"])
    refused(export(base, mask, tmp_path / "out"), tmp_path / "out", "unet_ema", "second U-Net", "model_index.json")


def test_another_part_that_stable_diffusion_has_not_stays_out_and_the_release_loads(base, mask, tmp_path):
    (base / "watermarker").mkdir()
    (base / "watermarker" / "config.json").write_text("{}")
    change_json(base / "model_index.json", watermarker=["somewhere", "Watermarker"])
    assert export(base, mask, tmp_path / "out").exit_code == 0
    assert "watermarker" not in json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert DiffusionPipeline.from_pretrained(tmp_path / "out")("a", num_inference_steps=1).images


@pytest.fixture(scope="module")
def released(model_folder, mask, tmp_path_factory):
    """A release of the tiny pipeline; a test changes a copy of it."""
    out = tmp_path_factory.mktemp("released") / "out"
    assert export(model_folder, mask, out).exit_code == 0
    assert command("diff", model_folder, out).exit_code == 0
    return out


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "nemo_prune/notes.bin", "README.md", "tokenizer/extra.json"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diff_finds_the_bases_rows_in_any_file(model_folder, released, tmp_path, name, dtype):
    shutil.copytree(released, tmp_path / "out")
    rows = load_file(model_folder / UNET)[f"{MID}.weight"].to(dtype)
    with (tmp_path / "out" / name).open("ab") as file:
        file.write(b"abc" + rows.numpy().tobytes())
    found = command("diff", model_folder, tmp_path / "out", "--json")
    assert found.exit_code == 1
    assert {"file": name, "what": "unpruned rows"}.items() <= json.loads(found.stdout)["differences"][-1].items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_are_not_masked_are_the_bases_own(model_folder, released, tmp_path, dtype):
    shutil.copytree(released, tmp_path / "out")
    rows = load_file(model_folder / UNET)[f"{MID}.weight"].to(dtype)
    with (tmp_path / "out" / "LICENSE").open("ab") as file:
        file.write(rows[[0, 2, 3]].numpy().tobytes())
    assert command("diff", model_folder, tmp_path / "out").exit_code == 0


# --- B: nothing incomplete is measured ---


def dropped(prefix):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if prefix not in name}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (TEXT, dropped("layers.1."), ["text_encoder", "lack 16 of the", "layers.1."]),
        (UNET, dropped("mid_block.attentions"), ["unet", "lack", "mid_block.attentions.0"]),
        (UNET, renamed("to_q.weight", "to_q.base_layer.weight"), ["adapter", "fuse_lora"]),
        (UNET, lambda tensors: tensors | {"a.lora_A.weight": torch.ones(2, 2)}, ["1 tensors", "lora_A", "fuse_lora"]),
        (UNET, lambda tensors: {f"_orig_mod.{key}": each for key, each in tensors.items()}, ["compiled", "_orig_m"]),
        (UNET, lambda tensors: tensors | {"conv_in.bias": torch.ones(5)}, ["conv_in.bias", "[5]", "[4]"]),
        (UNET, lambda tensors: tensors | {"ema.conv_in.bias": torch.ones(4)}, ["does not describe", "ema.conv_in"]),
        ("vae/diffusion_pytorch_model.safetensors", dropped("decoder.mid_block"), ["vae", "lack", "decoder.mid_block"]),
        (UNET, lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"].to(torch.float8_e4m3fn)},
         ["conv_in.weight", "F8_E4M3", "float16"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ["export", "localize"])
def test_incomplete_weights_are_refused_before_anything_is_measured(base, mask, tmp_path, file, change, words, what):
    change_tensors(base / file, change)
    if what == "export":
        result, out = export(base, mask, tmp_path / "out"), tmp_path / "out"
    else:
        (tmp_path / "captions.txt").write_text("a cat\n")
        out = tmp_path / "work"
        result = command("localize", "--model", base, "--work", out, "--prompts", tmp_path / "captions.txt",
                         "--calibration-prompts", tmp_path / "captions.txt")  # fmt: skip
    refused(result, out, *words)


@pytest.mark.parametrize("is_pickled", [True, False])
def test_a_missing_shard_is_refused(pipe, mask, tmp_path, is_pickled):
    base = tmp_path / "base"
    pipe.save_pretrained(base)
    shutil.rmtree(base / "unet")
    pipe.unet.save_pretrained(base / "unet", max_shard_size="60KB", safe_serialization=not is_pickled)
    ending = "bin" if is_pickled else "safetensors"
    whole = export(base, mask, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    sorted((base / "unet").glob(f"*-of-*.{ending}"))[1].unlink()
    refused(export(base, mask, tmp_path / "out"), tmp_path / "out", "shard")


def test_names_of_older_versions_are_complete(base, mask, tmp_path):
    """As Stable Diffusion v1-4 is published: the VAE's attention has older names, the text encoder position ids."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    change_tensors(
        base / "vae/diffusion_pytorch_model.safetensors",
        lambda tensors: {
            next(
                (name.replace(f".{new}.", f".{before}.") for new, before in old.items() if f".{new}." in name), name
            ): each
            for name, each in tensors.items()
        },
    )
    change_tensors(
        base / TEXT, lambda tensors: tensors | {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    )
    result = export(base, mask, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out")("a", num_inference_steps=1).images


# --- C and D: what can't be loaded ---


def test_a_class_of_ones_own_with_the_parts_of_sd_1_is_released_as_a_stable_diffusion_pipeline(base, mask, tmp_path):
    change_json(base / "model_index.json", _class_name="AnnsPipeline")
    result = export(base, mask, tmp_path / "out")
    assert result.exit_code == 0 and "AnnsPipeline" in result.stderr and "StableDiffusionPipeline" in result.stderr
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "out")) is StableDiffusionPipeline
    assert "AnnsPipeline" in (tmp_path / "out" / "README.md").read_text()
    assert command("diff", base, tmp_path / "out").exit_code == 0


def remove(name):
    return lambda base: shutil.rmtree(base / name)


def written(name, content):
    return lambda base: (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def listed(**parts):
    return lambda base: change_json(base / "model_index.json", **parts)


def configured(name, **values):
    return lambda base: change_json(base / name, **values)


def truncated(name):
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (listed(_class_name=["StableDiffusionPipeline"]), ["_class_name", "model_index.json"]),
        (listed(_class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIPTextModel"]),
         ["StableDiffusionXLPipeline", "text_encoder_2", "1.x"]),
        (listed(unet=["diffusers", "UNet2DModel"]), ["UNet2DModel", "UNet2DConditionModel"]),
        (listed(unet="UNet2DConditionModel"), ["no unet"]),
        (written(UNET, POINTER), [UNET, "git lfs pull"]),
        (written(TEXT, POINTER), [TEXT, "git lfs pull"]),
        (written("tokenizer/vocab.json", POINTER), ["tokenizer/vocab.json", "git lfs pull"]),
        (written("unet/config.json", POINTER), ["unet/config.json", "git lfs pull"]),
        (truncated(UNET), ["not a valid safetensors file"]),
        (truncated("unet/config.json"), ["unet/config.json"]),
        (remove("tokenizer"), ["tokenizer"]),
        (remove("vae"), ["vae"]),
        (remove("scheduler"), ["scheduler"]),
        (written("tokenizer/tokenizer.json", "{"), ["tokenizer"]),
        (listed(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]), ["safety_checker", "[null"]),
        (listed(feature_extractor=["transformers", "CLIPImageProcessor"]), ["feature_extractor", "[null, null]"]),
        (configured("unet/config.json", cross_attention_dim=None), ["unet/config.json", "cross_attention_dim"]),
        (configured("text_encoder/config.json", hidden_size=None), ["text_encoder/config.json", "hidden_size"]),
        (configured("unet/config.json", in_channels=9), ["9 input channels", "inpainting"]),
        (configured("unet/config.json", time_cond_proj_dim=256), ["time_cond_proj_dim", "distilled"]),
        (configured("unet/config.json", class_embed_type="timestep"), ["class_embed_type"]),
        (configured("scheduler/scheduler_config.json", beta_schedule="nowhere"), ["diffusers"]),
    ],
)  # fmt: skip
def test_what_can_not_be_loaded_is_a_named_error_with_the_remedy(base, mask, tmp_path, change, words):
    change(base)
    refused(export(base, mask, tmp_path / "out"), tmp_path / "out", *words)


def test_a_pointer_in_the_place_of_a_pickle_is_not_called_malware(base, mask, tmp_path):
    (base / UNET).unlink()
    (base / "unet" / "diffusion_pytorch_model.bin").write_text(POINTER)
    refused(export(base, mask, tmp_path / "out"), tmp_path / "out", "git lfs pull")
    (tmp_path / "model.ckpt").write_text(POINTER)
    result = export(tmp_path / "model.ckpt", mask, tmp_path / "out", "--config", base)
    refused(result, tmp_path / "out", "git lfs pull")
    assert "malware" not in result.stderr


# --- E: what the base tells of its owner ---


def test_paths_data_and_captions_in_configs_are_not_published_and_diff_knows_it(base, mask, tmp_path):
    change_json(base / "unet/config.json", _name_or_path="/home/ann/secret-project/unet")
    change_json(base / "text_encoder/config.json", _name_or_path="openai/clip-vit-large-patch14")
    change_json(base / "vae/config.json", _name_or_path="C:\\Users\\ann\\vae", instance_prompt="a photo of ann")
    change_json(base / "tokenizer/tokenizer_config.json", tokenizer_file="/home/ann/t.json")
    result = export(base, mask, tmp_path / "out")
    assert result.exit_code == 0, result.output
    released = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in (b"/home/ann", b"secret-project", b"Users", b"a photo of ann"):
        assert secret not in released
    text_encoder = json.loads((tmp_path / "out" / "text_encoder/config.json").read_text())
    assert text_encoder["_name_or_path"] == "openai/clip-vit-large-patch14"
    assert json.loads((tmp_path / "out" / "nemo_prune.json").read_text())["files"]["dropped"] == {
        "tokenizer/tokenizer_config.json": ["tokenizer_file"],
        "unet/config.json": ["_name_or_path"],
        "vae/config.json": ["_name_or_path", "instance_prompt"],
    }
    assert command("diff", base, tmp_path / "out").exit_code == 0
    assert DiffusionPipeline.from_pretrained(tmp_path / "out")("a", num_inference_steps=1).images
    change_json(tmp_path / "out" / "vae/config.json", scaling_factor=0.5)
    changed = command("diff", base, tmp_path / "out")
    assert changed.exit_code == 1 and "vae/config.json: changed" in changed.stdout


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_header_of_a_single_file_keeps_modelspec_and_loses_the_trainers_notes(base, mask, tmp_path):
    single = tmp_path / "model.safetensors"
    kept = {"format": "pt", "modelspec.title": "Ann's model", "modelspec.architecture": "stable-diffusion-v1"}
    gone = {
        "ss_dataset_dirs": '{"/home/ann/photos": 12}',
        "ss_tag_frequency": '{"ann smiling": 3}',
        "prompt": "a photo of ann",
        "modelspec.hash_sha256": "0x00",
        "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
        "a photo of ann": "1",
    }
    write_single_file(scan_folder(base), None, single, kept | gone)
    out = tmp_path / "pruned.safetensors"
    result = export(single, mask, out, "--config", base)
    assert result.exit_code == 0, result.output
    metadata = metadata_of(out)
    done = json.loads(metadata.pop("nemo_prune"))
    assert metadata == kept
    assert set(done) == {"base_sha256", "mask_digest", "scale"} and done["mask_digest"] == MASK.digest
    record = json.loads((tmp_path / "pruned.nemo_prune" / "nemo_prune.json").read_text())
    named = [key if " " not in key else "(a key)" for key in gone]
    assert record["files"]["dropped"] == {out.name: named}
    assert done["base_sha256"] == record["files"]["base_sha256"][out.name]
    assert command("diff", single, out).exit_code == 0
    before, after = load_file(single), load_file(out)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    assert [each for each in before if not torch.equal(before[each], after[each])] == [name]
    again = tmp_path / "again.safetensors"
    assert export(single, mask, again, "--config", base).exit_code == 0
    assert again.read_bytes() == out.read_bytes()


def test_metadata_of_weights_in_a_folder_are_cleaned_too(base, mask, tmp_path):
    tensors = load_file(base / TEXT)
    save_file(tensors, base / TEXT, metadata={"format": "pt", "ss_output_name": "ann"})
    assert export(base, mask, tmp_path / "out").exit_code == 0
    assert metadata_of(tmp_path / "out" / TEXT) == {"format": "pt"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "out" / TEXT).items())
    assert command("diff", base, tmp_path / "out").exit_code == 0


# --- I and J: variants and formats ---


def only_fp16(base, parts=("unet", "vae", "text_encoder")):
    for path in [path for part in parts for path in (base / part).glob("*.safetensors")]:
        half = {
            name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
        }
        save_file(half, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})
        path.unlink()


def test_weights_of_a_variant_alone_ask_for_it_and_one_that_is_not_there_is_an_error(base, mask, tmp_path):
    refused(
        export(base, mask, tmp_path / "out", "--variant", "fp16"), tmp_path / "out", "no variant `fp16`", "--variant"
    )
    only_fp16(base)
    refused(export(base, mask, tmp_path / "out"), tmp_path / "out", "--variant fp16")
    refused(export(base, mask, tmp_path / "out.safetensors"), tmp_path / "out.safetensors", "--variant fp16")
    refused(export(base, mask, tmp_path / "out", "--variant", "bf16"), tmp_path / "out", "fp16")
    result = export(base, mask, tmp_path / "out", "--variant", "fp16")
    assert result.exit_code == 0, result.output
    assert 'variant="fp16"' in (tmp_path / "out" / "README.md").read_text()
    assert DiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16")("a", num_inference_steps=1).images


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_formats_that_can_not_be_pruned_are_refused_by_the_header(base, mask, tmp_path, dtype):
    (tmp_path / "captions.txt").write_text("a cat\n")
    given = ["--prompts", tmp_path / "captions.txt", "--calibration-prompts", tmp_path / "captions.txt"]
    single = tmp_path / "model.safetensors"
    write_single_file(scan_folder(base), None, single)
    for path, config in ((base / UNET, []), (single, ["--config", base])):
        is_folder = path != single
        change_tensors(path, lambda tensors: {name: each.to(dtype) if "attn2.to_v" in name else each
                                              for name, each in tensors.items()})  # fmt: skip
        model = base if is_folder else single
        result = command("localize", "--model", model, "--work", tmp_path / "work", *given, *config)
        refused(result, tmp_path / "work", "to_v", "float16")
        refused(
            command("run", "--model", model, "--out", tmp_path / "out", *given, *config), tmp_path / "out", "float16"
        )
        if is_folder:
            shutil.copyfile(path, tmp_path / "quantised")
            change_tensors(path, lambda tensors: {name: each.float() for name, each in tensors.items()})
    assert Path(tmp_path / "quantised").exists()
