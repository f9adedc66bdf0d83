"""Endings of checkpoints in upper and lower case, through the whole program."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.single_file import write_single_file
from nemo_prune.cli import app
from nemo_prune.mask import NeuronMask

MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
IN_FILE = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def base(model_folder, tmp_path):
    write_single_file(scan_folder(model_folder), None, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.mark.parametrize("name", ["model.CKPT", "model.SAFETENSORS"])
def test_a_single_file_in_capitals_is_pruned_and_compared(base, model_folder, tmp_path, name):
    tensors, given, out = load_file(base), tmp_path / name, tmp_path / "OUT.SAFETENSORS"
    if name.endswith("CKPT"):
        torch.save({"model": tensors, "args": argparse.Namespace(lr=1)}, given)
    else:
        base.rename(given)
    NeuronMask({MID: torch.arange(8) % 5 == 1}).save(tmp_path / "mask.safetensors")
    result = invoke("export", "--model", given, "--config", model_folder, "--mask", tmp_path / "mask.safetensors",
                    "--out", out, "--force", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"]["rows_changed"] == {"OUT.SAFETENSORS": 2}
    tensors[IN_FILE][[1, 6]] = 0
    pruned = load_file(out)
    assert pruned.keys() == tensors.keys() and all(torch.equal(pruned[each], tensors[each]) for each in tensors)
    assert invoke("diff", given, out, "--mask", tmp_path / "mask.safetensors").exit_code == 0


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors.bak", "model"])
def test_a_file_of_another_ending_is_told(base, tmp_path, name):
    base.rename(tmp_path / name)
    result = invoke("export", "--model", tmp_path / name, "--mask", "none", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "unsupported ending" in result.stderr and ".ckpt" in result.stderr
