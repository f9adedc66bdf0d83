"""What a release changed: every row that a mask accounts for, and everything that it does not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nemo_prune.checkpoint.diff import diff_folders, diff_models
from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.ldm_names import ema_name
from nemo_prune.checkpoint.single_file import patch_single_file, write_single_file
from nemo_prune.cli import app
from nemo_prune.mask import Neuron, NeuronMask, Pruning

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def mask():
    return NeuronMask.from_neurons([Neuron(MID, 1), Neuron(MID, 6)], {MID: 8})


@pytest.fixture
def out(model_folder, mask, tmp_path):
    """An export with its mask."""
    folder = tmp_path / "out"
    folder.mkdir()
    export_checkpoint(model_folder, mask, folder)
    (folder / "nemo_prune").mkdir()
    mask.save(folder / "nemo_prune" / "mask.safetensors")
    return folder


def diff(base, out, *options):
    return CliRunner().invoke(app, ["diff", str(base), str(out), *map(str, options)])


def test_a_release_differs_in_the_masked_rows_alone(model_folder, out):
    result = diff(model_folder, out)
    assert result.exit_code == 0, result.output
    assert (
        f"{WEIGHTS}: {MID}.weight rows 1, 6\n" in result.stdout and "Nothing but what the mask prunes" in result.stdout
    )
    shown = json.loads(diff(model_folder, out, "--json").stdout)
    assert shown["unexpected"] == 0 and [each["file"] for each in shown["differences"]] == [
        "nemo_prune/mask.safetensors", WEIGHTS,
    ]  # fmt: skip


def test_a_model_does_not_differ_from_itself(model_folder):
    assert list(diff_folders(model_folder, model_folder)) == []


def test_a_smaller_mask_does_not_account_for_the_rest(model_folder, out, tmp_path):
    NeuronMask.from_neurons([Neuron(MID, 1)], {MID: 8}).save(tmp_path / "smaller.safetensors")
    result = diff(model_folder, out, "--mask", tmp_path / "smaller.safetensors")
    assert result.exit_code == 1 and "not accounted for" in result.stdout


@pytest.mark.parametrize("part", ["one bit", "a vector", "another file", "a new file", "a lost file", "the header"])
def test_anything_else_is_found(model_folder, out, part):
    path = out / WEIGHTS
    if part in ("one bit", "a vector"):
        tensors = load_file(path)
        name = f"{MID}.weight" if part == "one bit" else "conv_in.bias"
        before = tensors[name].flatten()
        # The last bit of the last row, which is not masked.
        before.view(torch.int32)[-1] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})
        expected = {(WEIGHTS, name)}
    elif part == "another file":
        (out / "scheduler" / "scheduler_config.json").write_text("{}")
        expected = {("scheduler/scheduler_config.json", None)}
    elif part == "a new file":
        (out / "unet" / "malware.py").touch()
        expected = {("unet/malware.py", None)}
    elif part == "a lost file":
        (out / "model_index.json").rename(out / "unet" / "config.json")
        expected = {("model_index.json", None), ("unet/config.json", None)}
    else:
        save_file(load_file(path), path, metadata={"format": "pt", "note": "x"})
        expected = {(WEIGHTS, None)}
    mask = NeuronMask.load(out / "nemo_prune" / "mask.safetensors")
    found = {(each.file, each.tensor) for each in diff_folders(model_folder, out, mask) if not each.expected}
    assert found == expected


def test_what_an_export_leaves_out_is_accounted_for(model_folder, out, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "unet" / "model.bin").touch()
    found = {each.file: each for each in diff_folders(base, out, NeuronMask.load(out / "nemo_prune/mask.safetensors"))}
    assert found["unet/model.bin"].what == "left out" and found["unet/model.bin"].expected


LDM_MID = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
CONV_IN = "model.diffusion_model.input_blocks.0.0.bias"


@pytest.fixture
def files(model_folder, mask, tmp_path):
    """A base and a pruned release as single files, the mask in the folder beside it."""
    base, pruned = tmp_path / "base.safetensors", tmp_path / "pruned.safetensors"
    write_single_file(scan_folder(model_folder), None, base)
    save_file({**load_file(base), ema_name(LDM_MID): torch.ones(8, 16)}, base, metadata={"format": "pt"})
    shutil.copyfile(base, pruned)
    assert patch_single_file(pruned, Pruning(mask)) == (4, 2)
    (tmp_path / "pruned.nemo_prune").mkdir()
    mask.save(tmp_path / "pruned.nemo_prune" / "mask.safetensors")
    return base, pruned


@pytest.mark.slow
def test_single_files_and_folders_are_compared_by_the_names_that_they_share(model_folder, out, files, tmp_path):
    base, pruned = files
    pickled = tmp_path / "base.ckpt"
    torch.save({name: tensor.clone() for name, tensor in load_file(base).items()}, pickled)
    plain = tmp_path / "plain.safetensors"
    write_single_file(scan_folder(out), None, plain)
    mask = tmp_path / "pruned.nemo_prune" / "mask.safetensors"
    for before, after, names, layer in (
        (base, pruned, {LDM_MID, ema_name(LDM_MID)}, f"{MID}.weight"),
        (model_folder, plain, {LDM_MID}, f"{MID}.weight"),
        (base, out, {f"{MID}.weight"}, None),
        (pickled, plain, {LDM_MID}, f"{MID}.weight"),
    ):
        result = diff(before, after, "--mask", mask, "--json")
        assert result.exit_code == 0, result.output
        changed = [each for each in json.loads(result.stdout)["differences"] if each["what"] == "rows"]
        assert {each["tensor"] for each in changed} == names
        assert all(each["rows"] == [1, 6] and each["layer"] == layer for each in changed)
        assert diff(before, before).exit_code == 0
    # What a conversion leaves out is told, and accounted for; a copy in place leaves out nothing.
    assert f"base.ckpt: {ema_name(LDM_MID)} left out\n" in diff(pickled, plain, "--mask", mask).stdout
    assert diff(base, plain, "--mask", mask).exit_code == 1
    result = diff(base, pruned)
    assert result.exit_code == 0 and f"{LDM_MID} ({MID}.weight) rows 1, 6" in result.stdout


@pytest.mark.parametrize("part", ["a bit", "a row", "an average's row", "lost", "new", "shape", "metadata"])
def test_anything_else_in_a_single_file_is_found(files, mask, part):
    base, pruned = files
    tensors, metadata, name = load_file(pruned), {"format": "pt"}, LDM_MID
    if part == "a bit":
        name = CONV_IN
        tensors[name].view(torch.int32)[-1] ^= 1
    elif part == "a row":
        tensors[name][2] = 0
    elif part == "an average's row":
        name = ema_name(LDM_MID)
        tensors[name][2] = 0
    elif part == "lost":
        name = CONV_IN
        del tensors[name]
    elif part == "new":
        name = "model_ema.more"
        tensors[name] = torch.ones(1)
    elif part == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        name, metadata = None, {"format": "pt", "note": "x"}
    changed = pruned.with_name("changed.safetensors")
    save_file(tensors, changed, metadata)
    found = {each.tensor for each in diff_models(base, changed, mask) if not each.expected}
    assert found == {name} | ({None} if part in ("lost", "new", "shape", "metadata") else set())
