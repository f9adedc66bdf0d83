"""Models by Hub id, through the official client, from a server on this machine."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hub_server import COMMIT, Hub
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.checkpoint.single_file import write_single_file
from nemo_prune.files.layout import MASK_FILE

RESOLVE = """
import sys
from nemo_prune.errors import NemoPruneError
from nemo_prune.models.mask_source import find_mask
from nemo_prune.models.source import load_pipeline, resolve_model
import torch
for name in sys.argv[1:]:
    try:
        if name.startswith("mask of "):
            print(find_mask(name.removeprefix("mask of ")).read_text())
            continue
        source = resolve_model(*name.split("@"))
    except NemoPruneError as error:
        print("named error:", " ".join(str(error).split()))
    else:
        load_pipeline(source.folder, "cpu", torch.float32)
        converted = source.converted and source.converted.replace(" ", "_")
        print(source.repo_id, source.commit, (source.folder / "Model-License.txt").exists(), converted)
"""


@pytest.fixture(scope="module")
def hub(model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(model_folder, root / "owner" / "tiny")
    (root / "owner" / "tiny" / "Model-License.txt").write_text("a licence")
    shutil.copytree(root / "owner" / "tiny", root / "owner" / "pickled")
    for path in (root / "owner" / "pickled").rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else path.name.replace(".safetensors", ".bin")
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    shutil.copytree(model_folder, root / "owner" / "gated")
    (root / "owner" / "gated" / ".gated").touch()
    (root / "owner" / "captions").mkdir()
    (root / "owner" / "captions" / "train.jsonl").write_text(
        '{"title": "x", "caption": "a cat"}\n{"caption": "a dog"}\n'
    )
    for name, file in (("release", MASK_FILE), ("release", "unet.bin"), ("mask", "mask.safetensors")):
        path = root / "owner" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"what lies in {name}")
    with Hub(root) as server:
        yield server.url


def resolve(home, *models, endpoint="http://127.0.0.1:9", **environment):
    """The client reads its settings once, on import: each call is a process of its own; a line a model."""
    settings = {"HF_HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_OFFLINE": "0"} | environment
    return subprocess.run(
        [sys.executable, "-c", RESOLVE, *models],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )


# What can't be had, and a word of the error that says so.
REFUSED = {
    "owner/nowhere": "neither a local folder nor a repo",
    "owner/gated": "gated",
    "owner/tiny@no-such-branch": "--revision",
    "mask of owner/captions": "the repo has no such file",
    "mask of owner/nowhere": "Check the name",
    "mask of owner/mask@no-such-branch": "no such branch",
    "mask of no/such/file": "There is no mask at no/such/file",
}


@pytest.mark.slow
def test_repos_and_masks_are_fetched_and_used_offline_afterwards_and_others_are_named_errors(
    hub, model_folder, tmp_path
):
    """A model with its licence, also one of .bin weights; a single file's configs; of a release or a mask it alone."""
    file = tmp_path / "model.safetensors"
    write_single_file(scan_folder(model_folder), None, file)
    wanted = ["owner/pickled", f"{file}@@@owner/tiny", "mask of owner/release", "mask of owner/mask@main"]
    online = resolve(tmp_path, "owner/tiny", *wanted, *REFUSED, endpoint=hub)
    first, *found = online.stdout.splitlines()
    assert first.split() == ["owner/tiny", COMMIT, "True", "None"], online.stderr
    assert found[:4] == [
        f"owner/pickled {COMMIT} True the_.bin_weights_of_text_encoder,_unet,_vae",
        "None None False a_single-file_checkpoint_(.safetensors)",
        "what lies in release",
        "what lies in mask",
    ]
    for line, message in zip(found[4:], REFUSED.values(), strict=True):
        assert line.startswith("named error") and message in line
    assert not list(tmp_path.rglob("unet.bin"))
    offline = resolve(tmp_path, "owner/tiny", *wanted, "owner/other", "mask of owner/other", endpoint=hub,
                      HF_HUB_OFFLINE="1")  # fmt: skip
    *again, missing, missing_mask = offline.stdout.splitlines()
    assert again == [first, *found[:4]], offline.stderr
    assert "named error" in missing and "give a local folder or `demo`" in missing
    assert "named error" in missing_mask and "not in the local cache" in missing_mask
    # The client tries again for seconds before it gives up, each time.
    unreachable = resolve(tmp_path, "owner/tiny")
    assert unreachable.stdout.splitlines() == [first], unreachable.stderr


READ = """
import sys
from nemo_prune.errors import NemoPruneError
from nemo_prune.corpus.prompts import read_prompts
for name in sys.argv[1:]:
    try:
        print(*(prompt.text for prompt in read_prompts(name, limit=1)))
    except NemoPruneError as error:
        print("named error")
"""


@pytest.mark.slow
def test_prompts_of_a_data_set_are_streamed_and_a_wrong_name_split_or_column_is_told(hub, tmp_path):
    settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    names = ["owner/captions:train:caption", "owner/captions", "owner/nothing", "owner/captions:nowhere",
             "owner/captions:train:nothing"]  # fmt: skip
    command = [sys.executable, "-c", READ, *names]
    found = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.splitlines() == ["a cat"] * 2 + ["named error"] * 3, found.stderr
