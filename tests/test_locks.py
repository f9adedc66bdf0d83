"""Two processes never work in one place: the second is told at its start, and a dead one frees what it had."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
from typer.testing import CliRunner

from nemo_prune.cli import app
from nemo_prune.compute.local import LocalSession
from nemo_prune.errors import OutputError
from nemo_prune.files.locks import lock_for_this_process, sole_lock, waiting_lock
from nemo_prune.files.staging import staged_folder
from nemo_prune.files.work import LineLog, WorkFolder, claim_work_folder

BUSY = OutputError("busy")


class Other:
    """Another process that has a lock until it is told to end."""

    def __init__(self, code, *arguments):
        code = "import sys\n" + textwrap.dedent(code) + "\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


CLAIM = """
    from pathlib import Path
    from nemo_prune.files.work import claim_work_folder
    claim_work_folder(Path(sys.argv[1]))
"""
FLOCK = """
    import fcntl
    file = open(sys.argv[1], "ab")
    fcntl.flock(file, fcntl.LOCK_EX)
"""


def test_a_work_folder_has_one_process_until_it_ends_or_dies(tmp_path):
    work = tmp_path / "work"
    with Other(CLAIM, work):
        for _ in range(2):
            with pytest.raises(OutputError, match="Another process works in"):
                claim_work_folder(work)
        with pytest.raises(OutputError, match="Another process works in"):
            WorkFolder(work, {"a": 1})
        # Another folder is another thing.
        WorkFolder(tmp_path / "other", {"a": 1})
    WorkFolder(work, {"a": 1})
    # The same process may come back, and another one still may not.
    WorkFolder(work, {"a": 1})
    second = subprocess.run(
        [sys.executable, "-c", "import sys\n" + textwrap.dedent(CLAIM), str(work)], capture_output=True, text=True
    )
    assert second.returncode and "Another process works in" in second.stderr


def test_the_commands_are_told_before_they_load_the_model(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalSession, "__init__", lambda *_: pytest.fail("the model is loaded"))
    (tmp_path / "captions.txt").write_text("a cat\n")
    (tmp_path / "ordinary.txt").write_text("".join(f"thing {i}\n" for i in range(50)))
    captions = ["--prompts", tmp_path / "captions.txt", "--calibration-prompts", tmp_path / "ordinary.txt"]
    commands = {
        "run": ["--model", model_folder, "--out", tmp_path / "out"],
        "localize": ["--model", model_folder],
        "screen": ["--model", model_folder, "--out", tmp_path / "screened.jsonl"],
    }
    with Other(CLAIM, tmp_path / "work"):
        for command, options in commands.items():
            arguments = [command, *options, *captions, "--work", tmp_path / "work"]
            result = CliRunner().invoke(app, [str(each) for each in arguments])
            assert result.exit_code == 1 and "Another process works in" in result.stderr, result.output
        assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]
    # A refused model leaves no work folder.
    refused = ["localize", "--model", tmp_path / "nowhere", *captions, "--work", tmp_path / "free"]
    assert "nowhere" in CliRunner().invoke(app, [str(each) for each in refused]).stderr
    assert not (tmp_path / "free").exists()


def test_overwriting_keeps_the_lock_and_clears_the_rest(tmp_path):
    work = WorkFolder(tmp_path / "work", {"a": 1}).path
    (work / "images").mkdir()
    (work / "images" / "a.png").write_text("x")
    (work / "found.jsonl").write_text("{}\n")
    before = os.stat(work / ".lock").st_ino
    with pytest.raises(OutputError, match="changed since: a"):
        WorkFolder(work, {"a": 2})
    assert (work / "found.jsonl").exists()
    WorkFolder(work, {"a": 2}, overwrite=True)
    assert {path.name for path in work.iterdir()} == {".lock", "run.json"}
    assert os.stat(work / ".lock").st_ino == before and json.loads((work / "run.json").read_text()) == {"a": 2}


@pytest.mark.parametrize("names", [["notes.txt"], ["notes.txt", ".lock"]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, names, overwrite):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="not a work folder"):
        WorkFolder(tmp_path, {"a": 1}, overwrite)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_kill_left_before_the_identity_is_taken_up(tmp_path):
    (tmp_path / ".lock").touch()
    assert WorkFolder(tmp_path, {"a": 1}).path == tmp_path


def test_a_folder_that_was_removed_meanwhile_is_locked_anew(tmp_path):
    path = tmp_path / "work" / ".lock"
    lock_for_this_process(path, BUSY)
    path.unlink()
    with Other(FLOCK, path), pytest.raises(OutputError, match="busy"):
        lock_for_this_process(path, BUSY)
    lock_for_this_process(path, BUSY)


def test_a_sole_lock_refuses_at_once_and_leaves_nothing(tmp_path):
    path = tmp_path / "lock"
    with Other(FLOCK, path), pytest.raises(OutputError, match="busy"), sole_lock(path, BUSY):
        pytest.fail("it has the lock although another process has it")
    with sole_lock(path, BUSY):
        assert path.exists()
    assert not path.exists()
    with pytest.raises(KeyError), sole_lock(path, BUSY):
        raise KeyError
    assert not path.exists()


def test_a_waiting_lock_waits(tmp_path):
    path = tmp_path / "lock"
    code = FLOCK + "    import threading\n    threading.Timer(0.5, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()\n"
    began = time.monotonic()
    with Other(code, path):
        with waiting_lock(path):
            waited = time.monotonic() - began
        with waiting_lock(path):
            pass
    assert waited > 0.4


def test_a_place_that_can_not_be_written_is_a_named_error(tmp_path):
    (tmp_path / "file").touch()
    for take in (lambda path: lock_for_this_process(path, BUSY), lambda path: waiting_lock(path).__enter__()):
        with pytest.raises(OutputError, match="can't be written"):
            take(tmp_path / "file" / "lock")
    with pytest.raises(OutputError, match="can't be used"):
        claim_work_folder(tmp_path / "file")


def test_a_target_that_another_process_writes_is_refused(tmp_path):
    refused = pytest.raises(OutputError, match="Another process writes")
    with Other(FLOCK, tmp_path / ".out.lock"), refused, staged_folder(tmp_path / "out"):
        pytest.fail("two processes write one folder")


@pytest.mark.slow
def test_a_calibration_that_another_process_measures_is_refused(model_folder, tmp_path):
    (tmp_path / "ordinary.txt").write_text("".join(f"thing {i}\n" for i in range(50)))
    command = ["calibrate", "--model", str(model_folder), "--calibration-prompts", str(tmp_path / "ordinary.txt"),
               "--num-samples", "2", "--out", str(tmp_path / "calibration.safetensors")]  # fmt: skip
    with Other(FLOCK, tmp_path / ".calibration.safetensors.lock"):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1 and "Another process measures" in result.stderr, result.output
    assert CliRunner().invoke(app, command).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ordinary.txt", "calibration.safetensors"}


# --- logs are keyed, not counted ---


def screened(folder, model_folder, captions):
    (folder / "captions.txt").write_text("".join(f"{each}\n" for each in captions))
    command = ["screen", "--model", str(model_folder), "--prompts", str(folder / "captions.txt"), "--fdr", "0.99",
               "--calibration-prompts", str(folder / "ordinary.txt"), "--out", str(folder / "screened.jsonl"),
               "--json", "--overwrite"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (folder / "screened.jsonl").read_text().splitlines()]
    return {row["prompt"]: row for row in rows}, json.loads(result.stdout)


@pytest.mark.slow
def test_a_screenings_values_belong_to_captions_whatever_the_order_of_its_log(model_folder, tmp_path):
    # Short texts are close to the empty one, and their values are small.
    (tmp_path / "ordinary.txt").write_text("".join(f"{i}\n" for i in range(10)))
    captions = [f"a cat with {i} hats" for i in range(100)]
    first, facts = screened(tmp_path, model_folder, captions)
    assert facts["passed"] > 8
    work = tmp_path / "screened.jsonl.work"
    for name in ("sieved.jsonl", "scores.jsonl"):
        header, *lines = (work / name).read_text().splitlines()
        assert len(lines) > 1
        # As two processes that append to one log leave it: in another order, and some lines twice.
        (work / name).write_text("\n".join([header, *reversed(lines), lines[0]]) + "\n")
    again, same_facts = screened(tmp_path, model_folder, captions)
    assert again == first
    assert same_facts["sample_passes_per_prompt"] == facts["sample_passes_per_prompt"]


def test_a_log_of_other_prompts_is_begun_anew(tmp_path):
    log = LineLog(tmp_path / "log.jsonl", {"prompts": "abc"})
    log.append({"first": 0})
    assert len(list(LineLog(tmp_path / "log.jsonl", {"prompts": "abc"}))) == 1
    assert not list(LineLog(tmp_path / "log.jsonl", {"prompts": "xyz"}))
