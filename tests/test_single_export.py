"""An export to a single file without a folder beside it: what it holds, and that what it should not hold is noticed."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_prune.checkpoint.single_file import check_single_file, write_single_file
from nemo_prune.errors import OutputError
from nemo_prune.files.layout import ReleaseLayout
from nemo_prune.mask import Neuron, NeuronMask, Pruning
from nemo_prune.models.source import resolve_model
from nemo_prune.release.from_mask import export_model
from nemo_prune.release.writing import StagedRelease, write_weights


@pytest.fixture
def source(model_folder):
    return resolve_model(str(model_folder))


@pytest.fixture
def mask(pipe):
    from nemo_prune.engine.layers import find_text_projections, layer_sizes

    sizes = layer_sizes(find_text_projections(pipe.unet))
    return NeuronMask.from_neurons([Neuron(layer, 1) for layer in sizes], sizes)


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_it_is_the_file_that_is_made_beside_a_folder(source, mask, tmp_path, scale):
    files = []
    for loadable in (False, True):
        out = tmp_path / str(loadable)
        out.mkdir()
        release = StagedRelease(ReleaseLayout(out, out / "model.safetensors"), out / "folder")
        release.folder.mkdir()
        report = write_weights(source, Pruning(mask, scale), release, loadable)
        assert bool(list(release.folder.iterdir())) == loadable
        assert list(report.rows_changed) == ["model.safetensors"]
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_rows_are_changed_and_nothing_else(source, mask, tmp_path):
    mask.save(tmp_path / "mask.safetensors")
    write_single_file(source.files, None, tmp_path / "base.safetensors")
    record = export_model(source, tmp_path / "mask.safetensors", tmp_path / "out.safetensors", force=True)
    before, after = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "out.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(mask.layers)
    for name in changed:
        rows = (before[name] != after[name]).flatten(1).any(1).nonzero().flatten().tolist()
        assert rows == [1] and not after[name][1].any()
    assert sum(record.files.rows_changed.values()) == len(changed)


def test_what_is_not_as_it_should_be_is_noticed(source, mask, tmp_path):
    file, pruning = tmp_path / "file.safetensors", Pruning(mask, -0.25)
    write_single_file(source.files, None, file)
    with pytest.raises(OutputError, match="not written correctly"):
        check_single_file(file, source.files, None, pruning)
    check_single_file(file, source.files, None)
    tensors = load_file(file)
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, file)
    with pytest.raises(OutputError, match="not written correctly"):
        check_single_file(file, source.files, None)
