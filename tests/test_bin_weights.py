"""Folders and repos that hold .bin weights: converted to safetensors, with every value as it was."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.cli import app
from nemo_prune.errors import ModelError
from nemo_prune.facts import MaskFacts
from nemo_prune.mask import NeuronMask
from nemo_prune.models.source import find_again, load_pipeline, resolve_model

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def safetensors_of(folder, component):
    (path,) = (folder / component).glob("*.safetensors")
    return path


def to_bins(folder, component, ending="", shards=1, dtype=torch.float32, keep=False):
    """Replace a component's safetensors by pickles, as older folders have them."""
    path = safetensors_of(folder, component)
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in load_file(path).items()}
    names = sorted(tensors)
    for shard in range(shards):
        part = f"-{shard + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        content = {name: tensors[name] for name in names[shard::shards]}
        torch.save(content, folder / component / f"{STEMS[component]}{ending}{part}.bin")
    if shards > 1:
        (folder / component / f"{STEMS[component]}.bin.index.json").write_text("{}")
    if not keep:
        path.unlink()
    return tensors


@pytest.fixture
def base(model_folder, tmp_path):
    """The tiny model, to be changed, with a card and a licence beside it."""
    shutil.copytree(model_folder, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "base" / "LICENSE.md").write_text("the terms")
    return tmp_path / "base"


@pytest.fixture
def mask(model_folder, tmp_path):
    found = NeuronMask({MID: torch.arange(8) % 5 == 1})
    found.save(tmp_path / "mask.safetensors", MaskFacts(base_tensors=tensor_digests(scan_folder(model_folder), found)))
    return tmp_path / "mask.safetensors"


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


@pytest.mark.slow
def test_pickled_weights_are_converted_once_pruned_and_accounted_for(base, mask, tmp_path):
    before = {component: to_bins(base, component, shards=2 if component == "unet" else 1) for component in STEMS}
    source = resolve_model(str(base))
    assert source.folder != base and source.converted == "the .bin weights of text_encoder, unet, vae"
    for component, tensors in before.items():
        assert same(load_file(safetensors_of(source.folder, component)), tensors)
    load_pipeline(source.folder, "cpu", torch.float32)
    assert resolve_model(str(base)) == source == find_again(source)
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        result = CliRunner().invoke(
            app, ["export", "--model", str(base), "--mask", str(mask), "--out", str(out), "--json"]
        )
        assert result.exit_code == 0, result.output
        files = json.loads(result.stdout)["files"]
        assert "converted to safetensors" in " ".join(files["notes"])
        assert "converted to" in files["left_out"]["vae/diffusion_pytorch_model.bin"]
        diff = CliRunner().invoke(app, ["diff", str(base), str(out)])
        assert diff.exit_code == 0, diff.output
    assert not list((tmp_path / "out").rglob("*.bin*"))
    # The card and the licence are the base's, wherever it was converted.
    for place in (tmp_path / "out", tmp_path / "out.nemo_prune"):
        assert (place / "LICENSE.md").read_text() == "the terms" and "license: mit" in (place / "README.md").read_text()
    before["unet"][f"{MID}.weight"][[1, 6]] = 0
    assert same(load_file(safetensors_of(tmp_path / "out", "unet")), before["unet"])


def test_only_what_has_no_safetensors_is_converted_and_twins_are_left_out(base):
    to_bins(base, "unet", keep=True)
    assert resolve_model(str(base)).converted is None
    to_bins(base, "vae")
    source = resolve_model(str(base))
    assert source.converted == "the .bin weights of vae"
    assert "not safetensors" in source.left_out["unet/diffusion_pytorch_model.bin"]
    assert not list(source.folder.rglob("*.bin"))


def test_a_variant_that_is_pickled_is_converted_for_who_asks_for_it(base):
    half = to_bins(base, "unet", ending=".fp16", dtype=torch.float16, keep=True)
    assert resolve_model(str(base)).converted is None
    source = resolve_model(str(base), variant="fp16")
    assert same(load_file(source.folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"), half)
    # Loaded are the variant where it is there, and the plain weights elsewhere.
    assert load_pipeline(source.folder, "cpu", torch.float16, source.variant).unet.dtype == torch.float16


class _Malware:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_a_damaged_or_hostile_pickle_is_a_named_error(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_bins(base, "vae")
    path = base / "vae" / "diffusion_pytorch_model.bin"
    content = path.read_bytes()
    torch.save({"decoder.conv_in.bias": torch.ones(1), "x": _Malware()}, path)
    with pytest.raises(ModelError, match="mkdir"):
        resolve_model(str(base))
    for damaged in (content[: len(content) // 2], b"", b"PK\x03\x04" * 9, os.urandom(300)):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin"):
            resolve_model(str(base))
    assert not (tmp_path / "ran").exists()
    path.write_bytes(content)
    assert resolve_model(str(base)).converted
