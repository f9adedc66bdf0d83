"""The example in the package's docstring does what it says."""

import doctest

import pytest

import nemo_prune


@pytest.mark.slow
def test_the_example_of_the_package_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = doctest.testmod(nemo_prune)
    assert result.failed == 0 and result.attempted >= 8
    assert (tmp_path / "pruned" / "model_index.json").is_file() and (tmp_path / "pruned.work").is_dir()
