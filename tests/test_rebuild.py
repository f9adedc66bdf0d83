"""A base and a mask give the release again; another base is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.fingerprint import check_base, tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.cli import app
from nemo_prune.errors import MaskError
from nemo_prune.facts import BaseFacts, MaskFacts
from nemo_prune.mask import Neuron, NeuronMask

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def mask(model_folder, tmp_path):
    """A mask file that knows its base."""
    found = NeuronMask.from_neurons([Neuron(MID, 1), Neuron(MID, 6)], {MID: 8})
    facts = MaskFacts(BaseFacts("tiny"), base_tensors=tensor_digests(scan_folder(model_folder), found))
    found.save(tmp_path / "mask.safetensors", facts)
    return tmp_path / "mask.safetensors"


def export(model, mask, out, *options):
    arguments = ["export", "--model", model, "--mask", mask, "--out", out, *options]
    return CliRunner().invoke(app, list(map(str, arguments)))


def changed(base, change):
    """A copy of a base with one change to a tensor of it."""
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    return base


@pytest.fixture
def copy(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
def test_the_same_base_and_mask_give_the_same_files(model_folder, mask, tmp_path):
    assert export(model_folder, mask, tmp_path / "out").exit_code == 0
    (tmp_path / "direct").mkdir()
    direct = export_checkpoint(model_folder, NeuronMask.load(mask), tmp_path / "direct")
    facts = json.loads((tmp_path / "out" / "nemo_prune.json").read_text())
    assert facts["files"]["sha256"] == direct.sha256
    assert (tmp_path / "out" / "nemo_prune" / "mask.safetensors").read_bytes() == mask.read_bytes()
    again = export(model_folder, tmp_path / "out", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["files"] == facts["files"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 rows set to zero" in card and "Nothing was measured on this model" in card
    assert CliRunner().invoke(app, ["diff", str(model_folder), str(tmp_path / "out")]).exit_code == 0


def test_another_base_is_refused_and_forced_it_is_noted_in_the_card(copy, mask, tmp_path):
    changed(copy, lambda tensors: tensors[f"{MID}.weight"].mul_(1.01))
    result = export(copy, mask, tmp_path / "out")
    assert result.exit_code == 1 and MID in result.stderr and "--force" in result.stderr
    assert not (tmp_path / "out").exists()
    assert export(copy, mask, tmp_path / "out", "--force").exit_code == 0
    assert "forced on this one" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_differs_elsewhere_is_the_masks_base(copy, mask, tmp_path):
    changed(copy, lambda tensors: tensors["conv_in.weight"].mul_(1.01))
    assert export(copy, mask, tmp_path / "out").exit_code == 0
    assert "forced" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_a_lower_precision_is_recognised(model_folder, copy, mask, dtype):
    changed(copy, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    recorded = NeuronMask.load_with_facts(mask)[1].base_tensors
    lower = tensor_digests(scan_folder(copy), NeuronMask.load(mask))
    check_base(lower, recorded)
    check_base(tensor_digests(scan_folder(model_folder), NeuronMask.load(mask)), lower)
    with pytest.raises(MaskError, match="another base"):
        check_base({name: [] for name in lower}, recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scaled_rows_are_multiplied_and_nothing_else(copy, mask, tmp_path, dtype):
    changed(copy, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    result = export(copy, mask, tmp_path / "out", "--scale", -0.25)
    assert result.exit_code == 0, result.output
    before, after = load_file(copy / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    before[f"{MID}.weight"][[1, 6]] *= -0.25
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "multiplied by -0.25" in (tmp_path / "out" / "README.md").read_text()


def test_a_mask_that_knows_no_base_and_one_without_a_neuron_are_refused(model_folder, tmp_path):
    for name, neurons, word in (("unknown", [Neuron(MID, 1)], "--force"), ("empty", [], "no neuron")):
        NeuronMask.from_neurons(neurons, {MID: 8}).save(tmp_path / f"{name}.safetensors")
        result = export(model_folder, tmp_path / f"{name}.safetensors", tmp_path / "out")
        assert result.exit_code == 1 and word in result.stderr
