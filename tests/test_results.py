"""Result files, ours and those of the released code, and the commands that make and merge them."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nemo_prune.cli import app
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.merge import union_mask
from nemo_prune.engine.results import SD_V1_LAYERS, ResultsFile, ResultsHeader, merge_results, read_results
from nemo_prune.errors import OutputError, PromptError
from nemo_prune.mask import Neuron, NeuronMask

pytestmark = pytest.mark.usefixtures("few_images")

HEADER = ResultsHeader("abc", {"down.to_v": 4, "mid.to_v": 8}, 0.4, {"theta": 5.0})
FOUND = PromptLocalization("a cat", "localized", 0.9, (0, 3), (Neuron("down.to_v", 1),), (Neuron("down.to_v", 1),))
UNRESOLVED = PromptLocalization("a dog", "unresolved", 0.8, (1, 2), neurons=(Neuron("mid.to_v", 7),))


def test_what_is_appended_is_read_again_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "found.jsonl"
    file = ResultsFile(path, HEADER)
    file.append(FOUND)
    file.append(UNRESOLVED)
    assert read_results(path).header == HEADER
    assert ResultsFile(path, HEADER).read() == (FOUND, UNRESOLVED)
    path.write_bytes(path.read_bytes()[:-20])
    assert ResultsFile(path, HEADER).read() == (FOUND,)
    with pytest.raises(OutputError, match="threshold"):
        ResultsFile(path, ResultsHeader("abc", HEADER.layers, 0.5, HEADER.settings))


def test_files_of_one_model_merge_and_those_of_another_do_not(tmp_path):
    for name, header, found in (
        ("a", HEADER, FOUND),
        ("b", HEADER, UNRESOLVED),
        ("c", ResultsHeader("xyz", HEADER.layers, 0.4, HEADER.settings), FOUND),
    ):
        ResultsFile(tmp_path / f"{name}.jsonl", header).append(found)
    merged = merge_results([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert union_mask(merged.localizations, HEADER.layers).neurons == (Neuron("down.to_v", 1),)
    assert union_mask(merged.localizations, HEADER.layers, include_unresolved=True).num_neurons == 2
    with pytest.raises(PromptError, match="different models"):
        merge_results([tmp_path / "a.jsonl", tmp_path / "c.jsonl"])


def test_what_was_searched_with_means_is_not_merged_into_a_mask_of_zeros(tmp_path):
    ResultsFile(tmp_path / "zeros.jsonl", HEADER).append(FOUND)
    ResultsFile(tmp_path / "means.jsonl", replace(HEADER, ablation="mean")).append(FOUND)
    for paths in (["means.jsonl"], ["zeros.jsonl", "means.jsonl"]):
        with pytest.raises(PromptError, match=r"means\.jsonl .*--ablation zero"):
            merge_results([tmp_path / name for name in paths])


def test_tables_of_the_released_code_are_read_with_the_layers_of_sd_v1_4(tmp_path):
    table = tmp_path / "results.csv"
    table.write_text(
        "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM\n"
        "one;http://a;[[221, 221], [], [], [124], [], [], []];0.42;[[221, 221], [], [], [], [], [], []];0.42\n"
        "two;http://b;[[], [], [], [], [], [], [1279]];0.43;[[], [], [], [], [], [], [1279]];0.43\n"
    )
    out = tmp_path / "mask.safetensors"
    for options, expected in (([], 1), (["--include-unresolved", "--overwrite"], 2)):
        result = CliRunner().invoke(app, ["merge", str(table), "--out", str(out), "--json", *options])
        facts = json.loads(result.stdout)
        assert (facts["num_neurons"], facts["of"], facts["localized"]) == (expected, 5760, 1)
    mask = NeuronMask.load(out)
    assert mask.sizes == SD_V1_LAYERS and list(mask.layers)[-1].startswith("mid_block")
    assert Neuron("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", 1279) in mask.neurons
    assert CliRunner().invoke(app, ["merge", str(table), "--out", str(out)]).exit_code == 1


@pytest.mark.parametrize("content", ["", "{}\n", "no json\n", '{"nemo_prune_results": 99}\n'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match="is not a result file"):
        read_results(path)
    with pytest.raises(PromptError, match="no result file at"):
        read_results(tmp_path / "nowhere.jsonl")


@pytest.mark.slow
def test_the_stages_alone_give_the_mask_of_the_run(model_folder, tmp_path):
    """calibrate, localize in two halves, merge; and a calibration serves no other settings."""
    (tmp_path / "a.txt").write_text("a zebra\n")
    (tmp_path / "b.txt").write_text("a dog\n")
    (tmp_path / "both.txt").write_text("a zebra\na dog\n")
    (tmp_path / "ordinary.txt").write_text("".join(f"thing number {i}\n" for i in range(50)))
    calibration, mask = tmp_path / "calibration.safetensors", tmp_path / "mask.safetensors"
    common = ["--model", str(model_folder), "--num-samples", "2"]

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    ordinary = ["--calibration-prompts", tmp_path / "ordinary.txt"]
    assert invoke("calibrate", *common, *ordinary, "--out", calibration).exit_code == 0
    for name in ("a", "b"):
        command = ["localize", *common, "--prompts", tmp_path / f"{name}.txt", "--calibration", calibration]
        command += ["--threshold", "0.01", "--include-unresolved"]
        assert invoke(*command, "--work", tmp_path / name).exit_code == 0
    files = [tmp_path / name / "localizations.jsonl" for name in ("a", "b")]
    assert invoke("merge", *files, "--out", mask, "--include-unresolved").exit_code == 0
    run = invoke(
        "run", *common, *ordinary, "--prompts", tmp_path / "both.txt", "--calibration", calibration,
        "--out", tmp_path / "out", "--include-unresolved", "--threshold", "0.01",
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    merged, of_run = NeuronMask.load(mask), NeuronMask.load(tmp_path / "out" / "nemo_prune" / "mask.safetensors")
    assert merged.num_neurons and merged.neurons == of_run.neurons
    other = invoke("localize", *common, "--seed", "5", "--prompts", tmp_path / "a.txt", "--calibration", calibration,
                   "--work", tmp_path / "c")  # fmt: skip
    assert other.exit_code == 1 and "another settings" in other.stderr
