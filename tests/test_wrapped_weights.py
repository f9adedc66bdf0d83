"""Checkpoints as trainers save them: weights under some key, settings beside them, endings in capitals."""

import argparse
import os
import pathlib
from collections import OrderedDict

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_prune.checkpoint.conversion import convert_single_file
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.pickled import read_pickled
from nemo_prune.checkpoint.single_file import is_single_file, read_tensors, write_single_file
from nemo_prune.errors import ModelError, SettingsError
from nemo_prune.files.layout import ReleaseLayout, has_ending
from nemo_prune.models.mask_source import find_mask
from nemo_prune.screening.settings import ScreenOptions

WEIGHTS = {f"layer.{place}.weight": torch.full((2, 2), float(place)) for place in range(6)}
AVERAGES = {name: tensor + 100 for name, tensor in WEIGHTS.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def saved(path, content, is_zip=True):
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


def holds(found, tensors):
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("content", "wrapper", "others"),
    [
        (WEIGHTS, None, {}),
        (OrderedDict(WEIGHTS), None, {}),
        ({"state_dict": WEIGHTS}, "state_dict", {}),
        ({"model": WEIGHTS}, "model", {}),
        ({"module": WEIGHTS}, "module", {}),
        ({"weights": WEIGHTS, "epoch": 3}, "weights", {}),
        ({"ema": WEIGHTS}, "ema", {}),
        ({"model": {"state_dict": WEIGHTS}}, "model.state_dict", {}),
        ({"something else": WEIGHTS}, "a key with other characters", {}),
        # A counter, and what an optimizer keeps, are not the weights.
        ({"model": WEIGHTS, "step": torch.tensor(5)}, "model", {}),
        ({"model": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}, 1: {}}}}, "model", {}),
        ({"optimizer": {"state": {"a": {"x": torch.ones(2), "y": torch.ones(2)}}}, "net": WEIGHTS}, "net", {}),
        # The plain weights are what is measured, in whatever order the file has them.
        ({"ema": AVERAGES, "model": WEIGHTS}, "model", {"ema": 6}),
        ({"model_ema": AVERAGES, "generator": WEIGHTS}, "generator", {"model_ema": 6}),
        ({"model": {"ema": AVERAGES, "params": WEIGHTS}}, "model.params", {"model.ema": 6}),
        ({"model": AVERAGES, "state_dict": WEIGHTS}, "state_dict", {"model": 6}),
    ],
)
def test_weights_are_found_under_the_key_that_a_trainer_gave_them(tmp_path, content, wrapper, others, is_zip):
    found = read_pickled(saved(tmp_path / "model.ckpt", content, is_zip))
    assert holds(found.tensors, WEIGHTS)
    assert (found.wrapper, dict(found.others)) == (wrapper, others)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"generator": WEIGHTS, "critic": AVERAGES}, "several sets of weights: generator, critic"),
        ({"epoch": 3, "model": {}}, "no named tensors"),
        ([WEIGHTS["layer.0.weight"]], "no named tensors"),
        ({"a": {"b": {"c": {"d": {"e": WEIGHTS}}}}}, "no named tensors"),
    ],
)
def test_what_is_not_one_set_of_weights_is_a_named_error(tmp_path, content, message):
    with pytest.raises(ModelError, match=message):
        read_pickled(saved(tmp_path / "model.ckpt", content))


def test_a_mapping_that_holds_itself_ends(tmp_path):
    content = {"model": WEIGHTS}
    content["again"] = content
    assert holds(read_pickled(saved(tmp_path / "model.ckpt", content)).tensors, WEIGHTS)


# --- what trainers leave beside the weights ---


@pytest.mark.parametrize("is_zip", [True, False])
def test_settings_of_a_training_program_are_stubs(tmp_path, is_zip):
    settings = argparse.Namespace(lr=1e-4, out=pathlib.PurePosixPath("/home/someone"), inner=argparse.Namespace(a=[1]))
    found = read_pickled(saved(tmp_path / "model.ckpt", {"args": settings, "model": WEIGHTS}, is_zip))
    assert holds(found.tensors, WEIGHTS)


class _Malware:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


class _InPackage:
    def __reduce__(self):
        # It would write a file if it were not a stub.
        return (numpy.savetxt, ("ran", [1.0]))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_stub_opens_no_door(tmp_path, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    content = {"args": argparse.Namespace(run=_Malware()), "model": WEIGHTS}
    with pytest.raises(ModelError, match=r"wants to run `\w*\.?mkdir`.*malware"):
        read_pickled(saved(tmp_path / "model.ckpt", content, is_zip))
    # A stub stands for the package's class: it is made, and does nothing.
    found = read_pickled(saved(tmp_path / "other.ckpt", {"args": _InPackage(), "model": WEIGHTS}, is_zip))
    assert holds(found.tensors, WEIGHTS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02}q"]
)
def test_what_is_not_a_pickle_is_not_called_malware(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.ckpt") as raised:
        read_pickled(tmp_path / "model.ckpt")
    assert "malware" not in str(raised.value) and "more than tensors" not in str(raised.value)


def test_a_pointer_of_git_lfs_is_told_as_one(tmp_path):
    (tmp_path / "model.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        read_pickled(tmp_path / "model.ckpt")


# --- the whole conversion, and endings ---


@pytest.fixture(scope="module")
def single_file(model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write_single_file(scan_folder(model_folder), None, path)
    return path


def test_the_record_says_where_the_weights_were_and_what_was_left_out(single_file, model_folder, tmp_path):
    tensors = load_file(single_file)
    averages = {name: tensor + 1 for name, tensor in tensors.items()}
    content = {"ema": averages, "model": tensors, "args": argparse.Namespace(lr=1)}
    found = convert_single_file(saved(tmp_path / "model.CKPT", content), scan_folder(model_folder))
    assert found.converted == "a single-file checkpoint (.ckpt, its weights under `model`)"
    assert found.left_out["ema.*"] == f"{len(tensors)} tensors beside the weights"
    plain = convert_single_file(saved(tmp_path / "plain.ckpt", tensors), scan_folder(model_folder))
    assert plain.converted == "a single-file checkpoint (.ckpt)" and "ema.*" not in plain.left_out
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (found.folder / name).read_bytes() == (plain.folder / name).read_bytes()


@pytest.mark.parametrize("name", ["model.SAFETENSORS", "model.SafeTensors", "model.safetensors"])
def test_endings_are_understood_in_any_case(single_file, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(single_file.read_bytes())
    assert is_single_file(path) and read_tensors(path).keys() == load_file(single_file).keys()
    assert ReleaseLayout.of(path) == ReleaseLayout(tmp_path / "model.nemo_prune", path)
    with pytest.raises(Exception, match="There is no mask at"):
        find_mask(f"owner/{name}")


def test_other_endings_are_other_things(tmp_path):
    assert is_single_file(tmp_path / "model.CKPT") and not is_single_file(tmp_path / "model.pt")
    assert not is_single_file(tmp_path / "safetensors") and not is_single_file(tmp_path / "model.safetensors.bak")
    assert has_ending(tmp_path / "a.PARQUET", ".parquet") and not has_ending(tmp_path / "parquet", ".parquet")
    assert ScreenOptions(tmp_path / "a.JSONL").out.name == "a.JSONL"
    with pytest.raises(SettingsError, match=r"--out is .*a\.csv"):
        ScreenOptions(tmp_path / "a.csv")


def test_a_pickle_under_a_safetensors_name_is_still_refused(tmp_path):
    path = saved(tmp_path / "model.SAFETENSORS", WEIGHTS)
    with pytest.raises(ModelError, match="safetensors file"):
        read_tensors(path)
    save_file(WEIGHTS, path)
    assert read_tensors(path).keys() == WEIGHTS.keys()
