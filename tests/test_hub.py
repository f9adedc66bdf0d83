"""Models by Hub id, through the official client, from a server on this machine."""

import os
import shutil
import subprocess
import sys

import pytest

from hub_server import COMMIT, Hub

RESOLVE = """
import sys
from nemo_prune.errors import NemoPruneError
from nemo_prune.source import load_pipeline, resolve_model
import torch
for name in sys.argv[1:]:
    try:
        source = resolve_model(*name.split("@"))
    except NemoPruneError as error:
        print("named error:", " ".join(str(error).split()))
    else:
        load_pipeline(source, "cpu", torch.float32)
        print(source.repo_id, source.commit, (source.folder / "Model-License.txt").exists())
"""


@pytest.fixture(scope="module")
def hub(model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(model_folder, root / "owner" / "tiny")
    (root / "owner" / "tiny" / "Model-License.txt").write_text("a licence")
    shutil.copytree(model_folder, root / "owner" / "gated")
    (root / "owner" / "gated" / ".gated").touch()
    (root / "owner" / "captions").mkdir()
    (root / "owner" / "captions" / "train.jsonl").write_text(
        '{"title": "x", "caption": "a cat"}\n{"caption": "a dog"}\n'
    )
    with Hub(root) as server:
        yield server.url


def resolve(home, *models, endpoint="http://127.0.0.1:9", **environment):
    """The client reads its settings once, on import: each call is a process of its own; a line a model."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **environment}
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
}


def test_a_repo_is_fetched_with_its_licence_and_used_offline_afterwards_and_others_are_named_errors(hub, tmp_path):
    online = resolve(tmp_path, "owner/tiny", *REFUSED, endpoint=hub)
    first, *refused = online.stdout.splitlines(keepends=True)
    assert first.split() == ["owner/tiny", COMMIT, "True"], online.stderr
    for line, message in zip(refused, REFUSED.values(), strict=True):
        assert line.startswith("named error") and message in line
    offline = resolve(tmp_path, "owner/tiny", "owner/other", endpoint=hub, HF_HUB_OFFLINE="1")
    found, missing = offline.stdout.splitlines(keepends=True)
    assert found == first, offline.stderr
    assert "named error" in missing and "give a local folder or `demo`" in missing
    unreachable = resolve(tmp_path, "owner/tiny")
    assert unreachable.stdout == first, unreachable.stderr


READ = """
import sys
from nemo_prune.errors import NemoPruneError
from nemo_prune.prompts import read_prompts
for name in sys.argv[1:]:
    try:
        print(*(prompt.text for prompt in read_prompts(name, limit=1)))
    except NemoPruneError as error:
        print("named error")
"""


def test_prompts_of_a_data_set_are_streamed_and_a_wrong_name_split_or_column_is_told(hub, tmp_path):
    settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    names = ["owner/captions:train:caption", "owner/captions", "owner/nothing", "owner/captions:nowhere",
             "owner/captions:train:nothing"]  # fmt: skip
    command = [sys.executable, "-c", READ, *names]
    found = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout.splitlines() == ["a cat"] * 2 + ["named error"] * 3, found.stderr
