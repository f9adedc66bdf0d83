"""What was published for known models: fetched, checked, used where it fits; from a server on this machine."""

import dataclasses
import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.activations import ActivationStatisticsFitter, neuron_activations
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.errors import DownloadError
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, demo_folder
from nemo_prune.models.known import SD_V1_4, URL_VARIABLE, PublishedCalibration, ReferenceFile
from nemo_prune.settings import MIN_CALIBRATION_PROMPTS, LocalizationSettings
from nemo_prune.stages.calibrate import why_not

TEXTS = [f"thing number {i}" for i in range(60)]


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """A served folder, and a cache of this test's own."""
    folder = tmp_path / "reference"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv(URL_VARIABLE, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Whatever the tests are run with: this server is to be asked.
    monkeypatch.setattr("nemo_prune.models.known.is_offline_mode", lambda: False)
    yield folder
    server.shutdown()
    server.server_close()


def published(folder, name, content):
    (folder / name).write_bytes(content)
    return ReferenceFile(name, sha256(content).hexdigest())


def test_a_file_is_fetched_once_and_used_offline_afterwards(reference, monkeypatch):
    file = published(reference, "prompts.csv", b"Caption;URL\na cat;x\n")
    kept = file.locate()
    assert kept.read_bytes() == b"Caption;URL\na cat;x\n"
    (reference / "prompts.csv").unlink()
    monkeypatch.setenv(URL_VARIABLE, "http://127.0.0.1:9")
    assert file.locate() == kept
    kept.write_bytes(b"damaged")
    with pytest.raises(DownloadError, match="not in the cache"):
        file.locate()


def test_another_files_content_is_refused_and_not_kept(reference, tmp_path):
    file = published(reference, "prompts.csv", b"Caption\na cat\n")
    (reference / "prompts.csv").write_bytes(b"Caption\na dog\n")
    with pytest.raises(DownloadError, match="sha256"):
        file.locate()
    assert not list(tmp_path.glob("cache/**/*.csv"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "no address", "http://"])
def test_without_an_answer_the_error_says_which_options_replace_the_files(reference, monkeypatch, address):
    monkeypatch.setenv(URL_VARIABLE, address)
    with pytest.raises(DownloadError, match=r"--prompts.*--calibration-prompts"):
        ReferenceFile("prompts.csv", "0" * 64).locate()


def test_the_published_statistics_give_the_papers_threshold(reference):
    sizes = list(SD_V1_4.published.sizes.values())
    lists = ([torch.full((n,), 0.5) for n in sizes], [torch.full((n,), 0.1) for n in sizes])
    torch.save(lists, reference / "statistics.pt")
    content = (reference / "statistics.pt").read_bytes()
    known = dataclasses.replace(SD_V1_4.published, statistics=published(reference, "statistics.pt", content))
    calibration = known.load()
    assert calibration.threshold == pytest.approx(0.428) and calibration.statistics.num_prompts == 50_000
    assert list(calibration.statistics.mean) == list(SD_V1_4.published.sizes)


def test_statistics_that_would_run_code_are_refused(reference, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    content = pickle.dumps(Harm())
    known = dataclasses.replace(SD_V1_4.published, statistics=published(reference, "statistics.pt", content))
    with pytest.raises(DownloadError, match="no activation statistics"):
        known.load()
    assert not (tmp_path / "harm").exists()


def test_a_published_calibration_fits_its_model_and_no_other(pipe, reference):
    predictor = NoisePredictor(pipe, LocalizationSettings())
    fitter = ActivationStatisticsFitter()
    fitter.update(neuron_activations(predictor.layers, predictor.encode(TEXTS)))
    own = fitter.statistics
    fits = publish(reference, own.mean, own.std, predictor)
    assert why_not(fits, predictor, TEXTS) is None
    shifted = publish(reference, {name: mean + own.std[name] for name, mean in own.mean.items()}, own.std, predictor)
    assert "1.00 standard deviations" in why_not(shifted, predictor, TEXTS)
    fewer = publish(reference, dict(list(own.mean.items())[1:]), own.std, predictor)
    assert "sizes" in why_not(fewer, predictor, TEXTS)
    later = dataclasses.replace(fits, timestep=fits.timestep - 20)
    assert "timestep" in why_not(later, predictor, TEXTS)
    other_seeds = dataclasses.replace(fits, settings=dataclasses.replace(fits.settings, seed=7))
    assert "seed" in why_not(other_seeds, predictor, TEXTS)


def publish(folder, mean, std, predictor):
    """A calibration as it is published for a model."""
    sizes = {name: len(values) for name, values in mean.items()}
    torch.save(([mean[name] for name in sizes], [std[name] for name in sizes]), folder / "own.pt")
    statistics = published(folder, "own.pt", (folder / "own.pt").read_bytes())
    return PublishedCalibration(
        "a tiny model", statistics, 60, 0.3, 0.1, sizes, predictor.timestep, predictor.settings, "as here"
    )


# The command line as installed, with the files of this test in the place of the published ones, and few images.
PROGRAM = """
import dataclasses, functools, json, sys
import nemo_prune.cli.run, nemo_prune.models.known as known
from nemo_prune.settings import VerificationSettings
files = {name: known.ReferenceFile(*file) for name, file in json.loads(sys.argv.pop(1)).items()}
published = dataclasses.replace(known.SD_V1_4.published, statistics=files.pop("statistics"))
known.KNOWN_MODELS["CompVis/stable-diffusion-v1-4"] = dataclasses.replace(known.SD_V1_4, published=published, **files)
nemo_prune.cli.run.VerificationSettings = functools.partial(
    VerificationSettings, num_inference_steps=4, images_per_prompt=2, ordinary_images=1, evidence_budget=300)
sys.exit(nemo_prune.cli.app())
"""


@pytest.mark.slow
def test_the_typed_command_on_a_model_under_the_known_id(reference, tmp_path):
    """The demo model as CompVis/stable-diffusion-v1-4: its layers have other sizes, so that it is calibrated afresh."""
    repo = tmp_path / "hub" / "CompVis" / "stable-diffusion-v1-4"
    shutil.copytree(demo_folder(), repo, ignore=shutil.ignore_patterns("training_images", "*.csv", "figures.json"))
    ordinary = "\n".join(["Caption", *(prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)[:60])])
    sizes = list(SD_V1_4.published.sizes.values())
    torch.save(([torch.zeros(n) for n in sizes], [torch.ones(n) for n in sizes]), reference / "statistics.pt")
    memorized = read_prompts(demo_folder() / PROMPTS_FILE)[:2]
    table = "Caption;type\n" + "".join(f'"{prompt.text}";{prompt.kind}\n' for prompt in memorized)
    files = {
        "memorized": published(reference, "memorized.csv", table.encode()),
        "ordinary": published(reference, "ordinary.csv", ordinary.encode()),
        "statistics": published(reference, "statistics.pt", (reference / "statistics.pt").read_bytes()),
    }
    server_program = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(tmp_path / "hub")]
    server = subprocess.Popen(server_program, stdout=subprocess.PIPE, text=True)
    try:
        endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
        settings["HF_HUB_OFFLINE"] = "0"
        known = json.dumps({name: dataclasses.astuple(file) for name, file in files.items()})
        typed = "run --model CompVis/stable-diffusion-v1-4 --out pruned/"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, known, *typed.split()],
            env={**os.environ, **settings}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stderr
    assert "measured afresh, because its layers have other sizes" in done.stderr
    facts = json.loads((tmp_path / "pruned" / "nemo_prune.json").read_text())
    assert facts["base"]["repo_id"] == "CompVis/stable-diffusion-v1-4" and facts["prompts"]["localized"] == 2
    # Ten of the sixty captions are held out for the evidence.
    assert facts["calibration"]["num_prompts"] == MIN_CALIBRATION_PROMPTS == 50
    assert facts["evidence"]["utility"]["captions"] > 0
