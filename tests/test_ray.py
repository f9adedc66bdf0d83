"""Workers of a Ray cluster on this machine: they find what a single process finds, also where one is killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import pytest

from nemo_prune.checkpoint.folder import CheckpointFiles
from nemo_prune.compute.local import LocalSession
from nemo_prune.compute.opening import open_session
from nemo_prune.compute.ray_cluster import connect, import_ray, resource_for
from nemo_prune.corpus.prompts import Corpus, Prompt
from nemo_prune.engine.results import read_results
from nemo_prune.errors import ModelError, SettingsError, WorkerError
from nemo_prune.models.known import OrdinaryCaptions
from nemo_prune.models.source import ModelSource, find_again, resolve_model
from nemo_prune.progress import Listener, Stage, ignored
from nemo_prune.run import localize_model
from nemo_prune.screening.screen import sieve_chunk
from nemo_prune.screening.settings import SieveSettings
from nemo_prune.settings import LocalizationPlan, LocalizationSettings, ModelOptions

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")

# Some of the captions are above the threshold, and their search is short.
SETTINGS = LocalizationSettings(num_samples=2, threshold=0.0246, theta_min=5.0)
ON_CPU = ModelOptions("cpu")
CORPUS = Corpus(tuple(Prompt(f"picture {i}") for i in range(8)), 0)
ORDINARY = OrdinaryCaptions(tuple(f"thing number {i}" for i in range(50)))


def localize(session, work, listener=Listener()):
    return localize_model(
        session, CORPUS, ORDINARY, LocalizationPlan(work, SETTINGS, ON_CPU, include_unresolved=True), listener
    )


def found_in(localizations):
    """What must not depend on who computed it: everything but the time."""
    return [dataclasses.replace(each, seconds=0.0) for each in localizations]


def sieved_by(session):
    """The sieves' values; not their passes, for every worker predicts the unconditional half once."""
    chunks = ([(number, f"picture {number}")] for number in range(5))
    records = session.map(partial(sieve_chunk, settings=SieveSettings(norm_step=0)), chunks)
    return sorted((record["first"], record["norm"], record["anisotropy"]) for record in records)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine with two CPUs, for all tests of this file that need one."""
    ray = import_ray()
    connect(ray, "auto", num_cpus=2)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory):
    """What a single process localizes, its work folder, and what it sieves."""
    work = tmp_path_factory.mktemp("alone") / "work"
    session = LocalSession(resolve_model(str(model_folder)), ON_CPU, SETTINGS)
    return localize(session, work)[1], work, sieved_by(session)


@needs_ray
@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_find_what_a_single_process_finds(cluster, alone, model_folder, tmp_path):
    killed = []

    def kill_one(done, total):
        if done and not killed:
            killed.append(session.places[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    class Killing(Listener):
        @contextmanager
        def stage(self, stage):
            yield kill_one if stage is Stage.LOCALIZE else ignored

    with open_session(resolve_model(str(model_folder)), ON_CPU, SETTINGS, "auto", 2) as session:
        file, localizations = localize(session, tmp_path, Killing())
        sieved = sieved_by(session)
        assert killed and session.workers_lost == 1
        assert killed[0] not in [place.pid for place in session.places]
    expected, work, expected_sieved = alone
    assert sieved == expected_sieved
    assert {each.status for each in expected} == {"not_memorized", "unresolved"} and any(e.neurons for e in expected)
    assert found_in(localizations) == found_in(expected)
    assert [each.prompt for each in localizations] == [prompt.text for prompt in CORPUS.prompts]
    assert len(file.read_text().splitlines()) == 1 + len(CORPUS.prompts)
    calibration = "calibration.safetensors"
    assert (tmp_path / calibration).read_bytes() == (work / calibration).read_bytes()


@needs_ray
@pytest.mark.slow
def test_errors_of_workers_are_named_and_what_was_found_stays(cluster, model_folder):
    def task(session, chunk):
        if chunk == ["poison"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if chunk == ["error"]:
            raise ModelError("named")
        return [session.model_digest + text for text in chunk]

    found = []
    with open_session(resolve_model(str(model_folder)), ON_CPU, SETTINGS, "auto", 1) as session:
        # A worker takes seconds to start.
        session.most_deaths = 1
        with pytest.raises(ModelError, match=r"^named$"):
            list(session.map(task, [["error"]]))
        with pytest.raises(WorkerError, match="2 workers died on the same part") as error:
            for each in session.map(task, [["a", "b"], ["poison"], ["c"]]):
                found.append(each)
        assert found == [session.model_digest + text for text in "ab"]
    assert "--ray-workers" in str(error.value)


@needs_ray
@pytest.mark.slow
def test_what_the_cluster_has_not_is_an_error_and_not_a_wait(cluster, model_folder):
    def open_with(options, num_workers):
        with open_session(resolve_model(str(model_folder)), options, SETTINGS, "auto", num_workers):
            raise AssertionError("it opened")

    if not cluster.cluster_resources().get("GPU"):
        with pytest.raises(WorkerError, match=r"has 0 GPUs.*--device cpu"):
            open_with(ModelOptions(), None)
    with pytest.raises(WorkerError, match=r"has 2 CPUs.*needed are 3.*--ray-workers"):
        open_with(ON_CPU, 3)


@needs_ray
@pytest.mark.slow
def test_the_typed_command_is_quiet_and_finds_the_same(alone, model_folder, tmp_path):
    expected, work, _ = alone
    (tmp_path / "prompts.txt").write_text("".join(f"{each.prompt}\n" for each in expected[:3]))
    command = [sys.executable, "-m", "nemo_prune.cli", "localize", "--model", str(model_folder), "--num-samples", "2"]
    command += ["--threshold", "0.9", "--prompts", str(tmp_path / "prompts.txt"), "--work", str(tmp_path / "work")]
    command += ["--calibration", str(work / "calibration.safetensors"), "--device", "cpu"]
    done = subprocess.run([*command, "--ray", "auto", "--ray-workers", "1", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["not_memorized"] == 3
    assert not [line for line in done.stderr.splitlines() if "Processor" not in line], done.stderr
    found = read_results(tmp_path / "work" / "localizations.jsonl").localizations
    assert [each.score for each in found] == [each.score for each in expected[:3]]


def test_without_ray_the_error_says_how_to_install_it(model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(SettingsError, match=r'pip install "nemo-prune\[ray\]"'),
        open_session(resolve_model(str(model_folder)), ON_CPU, SETTINGS, "auto"),
    ):
        pass


def test_a_number_of_workers_needs_ray(model_folder):
    with (
        pytest.raises(SettingsError, match="--ray auto"),
        open_session(resolve_model(str(model_folder)), ON_CPU, SETTINGS, None, 2),
    ):
        pass


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1", "no address"])
def test_an_address_without_a_cluster_is_a_named_error_at_once(address):
    with pytest.raises(WorkerError, match=r"no Ray cluster .*--ray auto"):
        connect(import_ray(), address)


def test_the_device_decides_what_a_worker_needs():
    assert resource_for("auto") == resource_for("cuda:1") == ("GPU", "cuda")
    assert resource_for("cpu") == ("CPU", "cpu")
    with pytest.raises(SettingsError, match="mps"):
        resource_for("mps")


def test_a_model_that_is_not_on_the_workers_machine_is_named(tmp_path):
    def found_at(folder, model=None):
        return ModelSource(CheckpointFiles(folder, (), {}), model)

    assert find_again(found_at(tmp_path)).folder == tmp_path
    assert find_again(found_at(tmp_path / "of_the_driver", "demo")).folder.is_dir()
    with pytest.raises(ModelError, match=r"has no folder .*nowhere.*share"):
        find_again(found_at(tmp_path / "nowhere"))
