import pytest
import torch

from nemo_prune.errors import MaskError
from nemo_prune.facts import BaseFacts, MaskFacts
from nemo_prune.mask import Neuron, NeuronMask

SIZES = {"mid.to_v": 4, "down.to_v": 3}


def test_true_means_pruned_and_twice_counts_once():
    mask = NeuronMask.from_neurons([Neuron("down.to_v", 2), Neuron("down.to_v", 2), Neuron("mid.to_v", 0)], SIZES)
    assert mask.num_neurons == 2
    assert mask.layers["down.to_v"].tolist() == [False, False, True]
    assert mask.neurons == (Neuron("mid.to_v", 0), Neuron("down.to_v", 2))


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(3, 1, dtype=torch.bool), torch.tensor([0, 1])])
def test_other_dtypes_and_shapes_are_refused(tensor):
    with pytest.raises(MaskError, match=r"expected torch\.bool"):
        NeuronMask({"down.to_v": tensor})


@pytest.mark.parametrize("neuron", [Neuron("down.to_v", 3), Neuron("down.to_v", -1), Neuron("up.to_v", 0)])
def test_a_neuron_that_does_not_exist_is_refused(neuron):
    with pytest.raises(MaskError, match="does not exist"):
        NeuronMask.from_neurons([neuron], SIZES)


def test_saving_keeps_layers_order_and_metadata_and_is_reproducible(tmp_path):
    mask = NeuronMask.from_neurons([Neuron("mid.to_v", 1)], SIZES)
    for name in ("a", "b"):
        mask.save(tmp_path / name, MaskFacts(BaseFacts("x"), {"theta": 5.0}))
    loaded, facts = NeuronMask.load_with_facts(tmp_path / "a")
    assert list(loaded.layers) == list(SIZES)
    assert loaded.neurons == mask.neurons
    assert facts.settings == {"theta": 5.0}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"not a mask", (2**60).to_bytes(8, "little") + b"{}"])
def test_files_that_are_no_mask_are_refused(tmp_path, content):
    path = tmp_path / "mask.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MaskError, match="mask"):
        NeuronMask.load(path)


def test_a_model_with_other_layers_is_refused():
    mask = NeuronMask.from_neurons([], SIZES)
    mask.check({**SIZES, "more.to_v": 9})
    with pytest.raises(MaskError, match="has 3 neurons, the model's has 6"):
        mask.check({**SIZES, "down.to_v": 6})
    with pytest.raises(MaskError, match="not in the model"):
        mask.check({"mid.to_v": 4})
