"""Result files: one threshold, tables of the released code to the letter, and forms that other machines give them."""

import codecs
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nemo_prune.cli import app
from nemo_prune.engine.localize import PromptLocalization, count_statuses
from nemo_prune.engine.merge import union_mask
from nemo_prune.engine.results import ResultsFile, ResultsHeader, merge_results, read_results
from nemo_prune.errors import MaskError, PromptError
from nemo_prune.mask import Neuron

HEADER = ResultsHeader("abc", {"down.to_v": 4, "mid.to_v": 8}, 0.4, {"theta": 5.0})
FOUND = PromptLocalization("a cat", "localized", 0.9, (0, 3), (Neuron("down.to_v", 1),), (Neuron("down.to_v", 1),))
NAMES = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
NONE = "[[], [], [], [], [], [], []]"


def lists(**neurons):
    """Seven lists, some of which hold neurons: `first`, `mid`."""
    return str([neurons.get("first", []), *[[]] * 5, neurons.get("mid", [])])


def table(path, *rows, names=NAMES, encoding="utf-8"):
    path.write_bytes("\n".join([names, *(";".join(map(str, row)) for row in rows), ""]).encode(encoding))
    return path


def results(path, header, *found):
    file = ResultsFile(path, header)
    for each in found:
        file.append(each)
    return path


# --- thresholds ---


def test_results_of_different_thresholds_are_not_merged(tmp_path):
    first = results(tmp_path / "a.jsonl", HEADER, FOUND)
    other = results(tmp_path / "b.jsonl", replace(HEADER, threshold=0.41), replace(FOUND, prompt="a dog"))
    same = results(tmp_path / "c.jsonl", HEADER, replace(FOUND, prompt="a dog"))
    with pytest.raises(PromptError, match=r"different thresholds \(0\.4 and 0\.41\).*--calibration"):
        merge_results([first, other])
    assert len(merge_results([first, same]).localizations) == 2
    command = ["merge", str(first), str(other), "--out", str(tmp_path / "mask.safetensors")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "different thresholds" in result.stderr
    assert not (tmp_path / "mask.safetensors").exists()


# --- what a row of the released code means ---


def test_the_initial_score_decides_whether_a_prompt_is_resolved(tmp_path):
    """As in the published run: two prompts are a hair above .428 before the refinement and below it afterwards."""
    many = list(range(200))
    path = table(
        tmp_path / "results.csv",
        ("one", "u", lists(first=[7, 8]), 0.42, lists(first=[7]), 0.425),
        ("at the threshold", "u", lists(mid=[3]), 0.428, lists(mid=[3]), 0.4),
        ("a hair above", "u", lists(first=many), 0.42807427048683167, lists(first=many), 0.4205648899078369),
        ("another", "u", lists(mid=many), 0.4306545853614807, lists(mid=many), 0.4207024872303009),
    )
    found = read_results(path)
    assert [each.status for each in found.localizations] == ["localized", "localized", "unresolved", "unresolved"]
    assert union_mask(found.localizations, found.header.layers).num_neurons == 2
    assert union_mask(found.localizations, found.header.layers, include_unresolved=True).num_neurons == 400


@pytest.mark.parametrize(
    ("initial", "score", "refined", "status"),
    [
        (NONE, "0", NONE, "not_memorized"),
        (NONE, "0.0", NONE, "not_memorized"),
        (NONE, "0.3", NONE, "not_memorized"),
        # A set was found, and its score happens to be 0; or none, and the prompt is above the threshold.
        (lists(mid=[5]), "0", lists(mid=[5]), "localized"),
        (lists(mid=[5]), "0.1", NONE, "localized"),
        (NONE, "0.9", NONE, "unresolved"),
        (lists(mid=[5]), "nan", lists(mid=[5]), "unresolved"),
    ],
)
def test_rows_without_a_set_are_prompts_that_were_not_memorized(tmp_path, initial, score, refined, status):
    found = read_results(table(tmp_path / "results.csv", ("one", "u", initial, score, refined, score)))
    assert [each.status for each in found.localizations] == [status]
    (one,) = found.localizations
    assert (one.candidates_score is None) == (status == "not_memorized")


def test_the_command_counts_them_as_such(tmp_path):
    rows = [("one", "u", lists(mid=[5]), 0.1, lists(mid=[5]), 0.1), ("two", "u", NONE, 0, NONE, 0)]
    path, out = table(tmp_path / "results.CSV", *rows), tmp_path / "mask.safetensors"
    result = CliRunner().invoke(app, ["merge", str(path), "--out", str(out), "--json"])
    facts = json.loads(result.stdout)
    assert (facts["localized"], facts["not_memorized"], facts["unresolved"], facts["num_neurons"]) == (1, 1, 0, 1)


@pytest.mark.parametrize("index", [-1, 320, 10**9])
def test_a_neuron_that_does_not_exist_is_refused(tmp_path, index):
    found = read_results(table(tmp_path / "r.csv", ("one", "u", lists(first=[index]), 0.1, lists(first=[index]), 0.1)))
    with pytest.raises(MaskError, match="does not exist"):
        union_mask(found.localizations, found.header.layers)


# --- forms that tables and lines have on other machines ---

ROW = ("Café; 猫", "u", lists(mid=[5]), 0.1, lists(mid=[5]), 0.1)
QUOTED = ('"Café; 猫"', *ROW[1:])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("names", [NAMES, f"sep=;\n{NAMES}", NAMES.replace(";", " ; "), f";{NAMES}"])
def test_tables_that_went_through_a_spreadsheet_are_read(tmp_path, encoding, names):
    row = ("0", *QUOTED) if names.startswith(";") else QUOTED
    found = read_results(table(tmp_path / "results.csv", row, names=names, encoding=encoding))
    assert [(each.prompt, each.status) for each in found.localizations] == [("Café; 猫", "localized")]


def test_commas_and_cells_of_any_length_are_read_too(tmp_path):
    path = tmp_path / "results.csv"
    cell = f'"{lists(first=list(range(320)) * 100)}"'
    path.write_text(f'{NAMES.replace(";", ",")}\n"a, b",u,{cell},0.1,{cell},0.1\n')
    assert len(cell) > 131_072
    (found,) = read_results(path).localizations
    assert (found.prompt, len(found.neurons)) == ("a, b", 320)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW, "line 2 has 7 cells, its header 6"),
        (("a", "u", NONE), "line 2 has 3 cells"),
        (('"a', *ROW[1:]), "line 2 opens a quote"),
        (("a", "u", "[[1], [2]]", 0.1, NONE, 0.1), "not a result file"),
        (("a", "u", "__import__('os').getcwd()", 0.1, NONE, 0.1), "not a result file"),
        (("a", "u", NONE, "0;1", NONE, 0.1), "line 2 has 7 cells"),
    ],
)
def test_damaged_rows_are_named_errors(tmp_path, row, message):
    with pytest.raises(PromptError, match=message):
        read_results(table(tmp_path / "results.csv", row))


@pytest.mark.parametrize("change", [lambda content: codecs.BOM_UTF8 + content, lambda c: c.replace(b"\n", b"\r\n")])
def test_lines_that_went_through_an_editor_are_read(tmp_path, change):
    path = results(tmp_path / "a.jsonl", HEADER, FOUND, replace(FOUND, prompt="two\r\nlines\u2028and a \x85 third"))
    before = read_results(path)
    path.write_bytes(change(path.read_bytes()))
    assert read_results(path) == before


def test_results_whose_last_line_is_cut_off_are_not_merged_as_if_they_were_whole(tmp_path):
    path = results(tmp_path / "a.jsonl", HEADER, FOUND, replace(FOUND, prompt="a dog"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(PromptError, match="last line is cut off"):
        merge_results([path])
    # A file without its last line break is whole.
    path.write_bytes(whole.removesuffix(b"\n"))
    assert count_statuses(merge_results([path]).localizations)["localized"] == 2
    # The command that made the file goes on where it was stopped.
    path.write_bytes(whole[:-20])
    assert ResultsFile(path, HEADER).read() == (FOUND,)


def test_a_very_long_caption_survives(tmp_path):
    long = replace(FOUND, prompt="word " * 1_000_000)
    assert read_results(results(tmp_path / "a.jsonl", HEADER, long)).localizations == (long,)
