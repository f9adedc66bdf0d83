"""What a stop leaves in the work folder, and that it is taken up again."""

import pytest
import torch

from nemo_prune.compute.local import LocalSession
from nemo_prune.files.kept_tensors import kept_tensors
from nemo_prune.files.work import LineLog
from nemo_prune.models.source import resolve_model
from nemo_prune.settings import LocalizationSettings, ModelOptions
from nemo_prune.stages.calibrate import measure_calibration

TEXTS = [f"thing number {i}" for i in range(50)]


def test_a_log_keeps_its_lines_drops_a_torn_one_and_begins_anew_for_something_else(tmp_path):
    path = tmp_path / "log.jsonl"
    log = LineLog(path, {"of": "this"})
    log.append({"a": 1})
    log.append(["é", None])
    path.write_bytes(path.read_bytes() + b'{"torn": ')
    assert list(LineLog(path, {"of": "this"})) == [{"a": 1}, ["é", None]]
    assert list(LineLog(path, {"of": "that"})) == []
    assert list(LineLog(path, {"of": "this"})) == []
    path.write_bytes(b'{"of": "th')
    assert list(LineLog(path, {"of": "this"})) == []


def test_tensors_are_computed_once_and_again_where_their_file_is_damaged(tmp_path):
    file, made = tmp_path / "kept.safetensors", []

    def make():
        made.append(1)
        return {"a": torch.arange(3.0)[:2], "b": torch.tensor([len(made)])}

    first = kept_tensors(file, make)
    assert first["a"].tolist() == [0, 1] and len(made) == 1
    assert kept_tensors(file, make)["b"].tolist() == [1] and len(made) == 1
    file.write_bytes(file.read_bytes()[:-5])
    assert kept_tensors(file, make)["b"].tolist() == [2] and kept_tensors(file, make)["b"].tolist() == [2]
    assert kept_tensors(None, make)["b"].tolist() == [3]


@pytest.mark.slow
def test_a_calibration_that_is_stopped_goes_on_and_ends_as_an_undisturbed_one(model_folder, tmp_path):
    session = LocalSession(
        resolve_model(str(model_folder)), ModelOptions(device="cpu"), LocalizationSettings(num_samples=2)
    )
    undisturbed = measure_calibration(session, TEXTS, tmp_path / "undisturbed.safetensors")

    def stop(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_calibration(session, TEXTS, tmp_path / "stopped.safetensors", stop)
    passes_before = session.predictor.sample_passes
    calibration = measure_calibration(session, TEXTS, tmp_path / "stopped.safetensors")
    assert session.predictor.sample_passes - passes_before == 30 * 2
    assert calibration.threshold == undisturbed.threshold
    for name, mean in undisturbed.statistics.mean.items():
        assert torch.equal(mean, calibration.statistics.mean[name])
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("undisturbed", "stopped")]
    assert contents[0] == contents[1]
    assert {path.name for path in tmp_path.iterdir()} == {"undisturbed.safetensors", "stopped.safetensors"}
