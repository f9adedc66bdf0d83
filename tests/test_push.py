"""Pushing to a Hub on this machine through the official client, in a process with an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from hub_server import Hub
from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.cli import app
from nemo_prune.errors import PushError, RecordError
from nemo_prune.facts import BaseFacts, MaskFacts
from nemo_prune.files.layout import CARD_FILE, MASK_FILE, PLOT_FILE, RECORD_FILE, ReleaseLayout
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.mask_source import find_mask
from nemo_prune.publish.parcel import pack
from nemo_prune.release.record import ImageAverages, Record
from nemo_prune.release.residual import with_findings
from records import changed, run_record

TOKEN = "hf_neverToBeSeenAnywhere"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def mask(model_folder, tmp_path_factory):
    """A mask file that knows its base."""
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    found = NeuronMask.from_neurons([Neuron(MID, 1), Neuron(MID, 6)], {MID: 8})
    base = BaseFacts("owner/tiny", "owner/tiny", "c0ffee")
    found.save(path, MaskFacts(base, base_tensors=tensor_digests(scan_folder(model_folder), found)))
    return path


@pytest.fixture(scope="module")
def made(model_folder, mask, tmp_path_factory):
    """A release by `nemo-prune export`, with a record as a run has it."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = CliRunner().invoke(app, ["export", "--model", str(model_folder), "--mask", str(mask), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rewrite(out)
    return out


def rewrite(release, **changes):
    """Seal a record anew: as a run has it that left nothing behind, with changes."""
    path = ReleaseLayout.found(release).record
    of_a_run = run_record()
    record = replace(Record.load(path), prompts=of_a_run.prompts, measured=of_a_run.measured)
    changed(record, **changes).save(path)


@pytest.fixture
def release(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_account(TOKEN, "me", orgs=(("ours", "write"), ("theirs", "read")))
        yield hub


# One process for all pushes: the client's settings are read on import, the token at each request.
DRIVER = """
import functools, json, os, sys, time
import huggingface_hub.hf_api  # Its log goes to this process's stderr, not to that of the first command.
from typer.testing import CliRunner
import nemo_prune.cli.run as run
from nemo_prune.cli import app
run.VerificationSettings = functools.partial(run.VerificationSettings, num_inference_steps=2, images_per_prompt=2)
time.sleep = lambda seconds: None  # The client waits up to 23 s before it gives up.
for line in sys.stdin:
    order = json.loads(line)
    os.environ["HF_TOKEN"] = order["token"]
    done = CliRunner().invoke(app, order["arguments"])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    print(json.dumps([done.exit_code, done.stdout, done.stderr, "torch" in sys.modules]), flush=True)
"""


class Pushing:
    """The client's process, and all that it ever said."""

    def __init__(self, hub, folder):
        self.said = folder / "said.txt"
        settings = {"HF_HOME": str(folder), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], env={**os.environ, **settings}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.said.open("w"), text=True,
        )  # fmt: skip

    def __call__(self, *arguments, token=TOKEN, command="push"):
        order = {"arguments": [command, *map(str, arguments)], "token": token}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, self.said.read_text()
        with self.said.open("a") as said:
            said.write(answer)
        self.code, self.stdout, self.stderr, self.torch_is_loaded = json.loads(answer)
        return self

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def pushing(hub, tmp_path_factory):
    pushing = Pushing(hub, tmp_path_factory.mktemp("home"))
    yield pushing
    pushing.close()
    assert TOKEN not in pushing.said.read_text()


@pytest.fixture(autouse=True)
def fresh(hub):
    hub.failures.clear()
    hub.requests.clear()


def on_disk(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_is_one_commit_and_the_same_again_is_none(hub, pushing, release):
    done = pushing(release, "me/pruned", "--private")
    repo = hub.repo("me/pruned")
    assert done.code == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/pruned/commit/{repo.refs['main']}\n" and not done.torch_is_loaded
    assert repo.private and len(repo.commits) == 2
    files, there = on_disk(release), dict(repo.files())
    assert '"me/pruned"' in there.pop(CARD_FILE).decode() and '"me/pruned"' not in files.pop(CARD_FILE).decode()
    assert {**files, ".gitattributes": there[".gitattributes"]} == there
    again = pushing(release, "me/pruned")
    assert again.code == 0 and again.stdout.strip().endswith(repo.refs["main"]) and "Nothing changed" in again.stderr
    assert len(repo.commits) == 2


def test_only_what_changed_is_sent_and_what_the_release_lost_is_deleted(hub, pushing, release):
    assert pushing(release, "ours/pruned").code == 0
    repo = hub.repo("ours/pruned")
    repo.add_commit({**repo.files(), "notes.txt": b"mine", CARD_FILE: b"---\n---\nedited there"}, "main")
    hub.requests.clear()
    sha256 = dict(Record.load(release / RECORD_FILE).files.sha256)
    del sha256["vae/config.json"]
    (release / "vae" / "config.json").unlink()
    rewrite(release, files={"sha256": sha256})
    (release / CARD_FILE).write_text((release / CARD_FILE).read_text() + "\nedited here\n")
    done = pushing(release, "ours/pruned", "--json")
    assert json.loads(done.stdout) == {
        "url": f"{hub.url}/ours/pruned/commit/{repo.refs['main']}",
        "sent": [CARD_FILE, RECORD_FILE],
        "deleted": ["vae/config.json"],
    }
    assert repo.files()["notes.txt"] == b"mine" and b"edited here" in repo.files()[CARD_FILE]
    assert hub.count("PUT /lfs") == 0


def test_a_branch_and_a_pull_request(hub, pushing, release):
    assert pushing(release, "me/branches", "--revision", "pruned").code == 0
    repo = hub.repo("me/branches")
    assert set(repo.files("main")) == {".gitattributes"} and RECORD_FILE in repo.files("pruned")
    opened = pushing(release, "me/branches", "--create-pr")
    assert opened.stdout == f"{hub.url}/me/branches/discussions/1\n" and RECORD_FILE in repo.files("refs/pr/1")
    assert set(repo.files("main")) == {".gitattributes"}
    assert pushing(release, "me/branches", "--create-pr").stdout == opened.stdout and "refs/pr/2" not in repo.refs
    assert pushing(release, "me/branches", "--create-pr", "--revision", "none").code == 1
    (hub.root / "you" / "others").mkdir(parents=True)
    assert pushing(release, "you/others", "--create-pr").stdout == f"{hub.url}/you/others/discussions/1\n"


def test_what_the_repo_ignores_is_sent_nevertheless(hub, pushing, release):
    (hub.root / "me" / "ignoring").mkdir(parents=True)
    (hub.root / "me" / "ignoring" / ".gitignore").write_text("*.safetensors\n")
    assert pushing(release, "me/ignoring").code == 0
    assert WEIGHTS in hub.repo("me/ignoring").files()


def test_the_unpruned_weights_in_a_repo_are_told_and_others_are_refused(hub, pushing, release, model_folder):
    shutil.copytree(model_folder, hub.root / "me" / "tiny")
    done = pushing(release, "me/tiny")
    assert done.code == 0 and "history" in done.stderr and WEIGHTS in done.stderr
    (hub.root / "me" / "mixed" / "unet").mkdir(parents=True)
    (hub.root / "me" / "mixed" / "unet" / "twin.bin").touch()
    done = pushing(release, "me/mixed")
    assert done.code == 1 and "unet/twin.bin" in done.stderr and len(hub.repo("me/mixed").commits) == 1


# What fails, how, and a word of the error. A 0 is a cut connection; the client tries some again by itself.
FAILURES = {
    "token": ("GET /api/whoami", 401, {}, "does not accept the token"),
    "right": ("GET .*/auth-check/write", 403, {"content": "Bearer {token} may not"}, "(Bearer [the token] may not)"),
    "gone": ("POST .*/commit/main", 404, {"headers": {"X-Error-Code": "RepoNotFound"}}, "Check the name"),
    "conflict": ("POST .*/commit/main", 409, {}, "Run the same command again"),
    "race": ("POST .*/commit/main", 412, {}, "changed meanwhile"),
    "upload": ("PUT /lfs", 500, {"after": 1, "times": 99}, "not sent again"),
    "commit": ("POST .*/commit/main", 500, {}, "not sent again"),
    "cut": ("PUT /lfs", 0, {"after": 1, "times": 99}, "connection was cut"),
    "cut-commit": ("POST .*/commit/main", 0, {}, "connection was cut"),
    "full": ("PUT /lfs", 507, {"after": 1}, "no room left"),
    "nonsense": ("POST .*/commit/main", 200, {"content": "<html>"}, "gave up"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_named_leaves_nothing_half_done_and_the_same_command_goes_on(hub, pushing, release, name):
    route, status, how, word = FAILURES[name]
    repo_id = f"me/fails-{name}"
    (hub.root / repo_id).mkdir(parents=True)
    hub.objects.clear()
    hub.fail(route, status, **how)
    failed = pushing(release, repo_id)
    repo = hub.repo(repo_id)
    assert failed.code == 1 and not failed.stdout
    assert "Error:" in failed.stderr and word in failed.stderr and "Traceback" not in failed.stderr
    assert len(repo.commits) == 1
    hub.failures.clear()
    hub.requests.clear()
    sent_ahead = len(hub.objects)
    assert pushing(release, repo_id).code == 0
    assert len(repo.commits) == 2 and hub.count("PUT /lfs") == len(hub.objects) - sent_ahead


def test_a_commit_in_between_is_a_race_and_nothing_is_overwritten(hub, pushing, release):
    assert pushing(release, "me/raced").code == 0
    repo = hub.repo("me/raced")
    (release / CARD_FILE).write_text("---\n---\nmine")
    other = {**repo.files(), CARD_FILE: b"---\n---\ntheirs"}
    hub.fail("POST .*/commit/main", None, first=lambda: repo.add_commit(other, "main"))
    failed = pushing(release, "me/raced")
    assert failed.code == 1 and "changed meanwhile" in failed.stderr and repo.files()[CARD_FILE].endswith(b"theirs")
    assert pushing(release, "me/raced").code == 0 and repo.files()[CARD_FILE].endswith(b"mine")


def scoped(owner, *permissions):
    return {"fineGrained": {"scoped": [{"entity": {"type": "user", "name": owner}, "permissions": permissions}]}}


def test_the_right_to_write_is_checked_before_anything_is_sent(hub, pushing, release):
    hub.add_account("hf_reads", "me", "read")
    hub.add_account("hf_fine", "me", "fineGrained", **scoped("me", "repo.content.read"))
    hub.add_account("hf_finer", "me", "fineGrained", **scoped("me", "repo.content.read", "repo.write"))
    (hub.root / "you" / "yours").mkdir(parents=True)
    (hub.root / "me" / "public").mkdir(parents=True)
    for arguments, token, word in (
        (("me/new",), "", "there is no token"),
        (("me/new",), "hf_unknown", "does not accept the token"),
        (("me/new",), "hf_é", "characters"),
        (("me/new",), "hf_\x01", "characters"),
        (("me/new",), "hf_reads", "can only read"),
        (("me/new",), "hf_fine", "may not write to repos of `me`"),
        (("new",), TOKEN, "not a valid name of a repo"),
        (("me/new..x",), TOKEN, "not a valid name of a repo"),
        (("you/new",), TOKEN, "you are `me`"),
        (("theirs/new",), TOKEN, "only read in the organisation"),
        (("you/yours",), TOKEN, "may not do this"),
        (("me/public", "--private"), TOKEN, "is public already"),
    ):
        refused = pushing(release, *arguments, token=token)
        assert refused.code == 1 and word in refused.stderr, (arguments, refused.stderr)
    assert not hub.count("POST") and hub.repo("me/new") is None
    assert pushing(release, "me/new", token="hf_finer").code == 0


def test_a_hub_that_tells_little_is_pushed_to(hub, pushing, release):
    hub.fail("GET /api/whoami", 429)
    hub.fail("GET .*/auth-check", 404)
    (hub.root / "me" / "terse").mkdir(parents=True)
    assert pushing(release, "me/terse").code == 0


@pytest.mark.slow
def test_a_mask_alone_is_pushed_with_a_card_and_not_into_a_models_repo(hub, pushing, release, mask):
    done = pushing(mask, "me/mask")
    assert done.code == 0, done.stderr
    there = hub.repo("me/mask").files()
    assert there["mask.safetensors"] == mask.read_bytes()
    card = there[CARD_FILE].decode()
    assert "base_model: owner/tiny" in card
    assert "nemo-prune export --model owner/tiny --mask me/mask --out pruned/" in card
    assert "Nothing changed" in pushing(mask, "me/mask").stderr
    shown = pushing("me/mask", "--json", command="inspect")
    assert json.loads(shown.stdout)["rows"] == {MID: [1, 6]}
    assert pushing(release, "me/both").code == 0
    refused = pushing(mask, "me/both")
    assert refused.code == 1 and WEIGHTS in refused.stderr


def test_a_run_asks_for_the_right_to_push_before_it_does_anything(hub, pushing, tmp_path):
    hub.add_account("hf_reads", "me", "read")
    arguments = ("--model", "demo", "--out", tmp_path / "out", "--push-to", "me/run")
    refused = pushing(*arguments, token="hf_reads", command="run")
    assert refused.code == 1 and "can only read" in refused.stderr
    aimless = pushing(*arguments[:4], "--private", command="run")
    assert aimless.code == 1 and "--push-to" in aimless.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_pushes_or_the_release_stands_and_the_error_says_the_command(hub, pushing, model_folder, tmp_path):
    """The tiny model is random, so that its prompts stay unresolved."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "ordinary.txt").write_text("\n".join(f"thing {i}" for i in range(50)))
    command = ["--model", model_folder, "--prompts", tmp_path / "prompts.txt", "--calibration-prompts",
               tmp_path / "ordinary.txt", "--num-samples", 2, "--threshold", 0.01, "--include-unresolved",
               "--work", tmp_path / "work", "--no-verify", "--push-to", "me/run"]  # fmt: skip
    refused = pushing(*command, "--out", tmp_path / "out", "--json", command="run")
    facts = json.loads(refused.stdout)
    assert refused.code == 1 and facts["out"] == str(tmp_path / "out") and facts["pushed"] is None
    assert "stayed unresolved" in refused.stderr and f"nemo-prune push {tmp_path / 'out'} me/run" in refused.stderr
    assert hub.repo("me/run") is None
    done = pushing(*command, "--out", tmp_path / "again", "--private", "--allow-residual", command="run")
    repo = hub.repo("me/run")
    assert done.code == 0 and f"Pushed: {hub.url}/me/run/commit/{repo.refs['main']}" in done.stdout
    assert repo.private and b"stayed unresolved" in repo.files()[CARD_FILE]
    again = pushing(tmp_path / "out", "me/run", "--allow-residual")
    assert again.code == 0 and set(json.loads(repo.files()[RECORD_FILE])) == set(facts) - {"out", "pushed"} | {"seal"}


LOAD = """
import sys
sys.modules["nemo_prune"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/loaded")
image = pipe("a cat", num_inference_steps=2, height=64, width=64).images[0]
print(image.size, float(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight[1].abs().sum()))
"""


@pytest.mark.slow
def test_stock_diffusers_loads_what_was_pushed_and_draws(hub, pushing, release, tmp_path):
    assert pushing(release, "me/loaded").code == 0
    settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", LOAD], env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.stdout == "(64, 64) 0.0\n", done.stderr


RESIDUAL = {
    "12.5% of the images": {"images": {"memorized": ImageAverages(3, copies_after=0.125)}},
    "2 memorized prompts stayed unresolved": {"prompts": {"unresolved": 2}},
    "1 memorized prompts still give": {"scores": {"suppressed_above_threshold": 1}},
    "not verified": {"export_verified": False},
}


@pytest.mark.parametrize("word", RESIDUAL)
def test_what_remains_is_refused_or_stands_in_the_card(release, word):
    rewrite(release, **RESIDUAL[word])
    with pytest.raises(PushError, match=word) as refused:
        pack(release, "me/x")
    assert "--allow-residual" in str(refused.value)
    card = pack(release, "me/x", allow_residual=True).files[CARD_FILE].decode()
    _, _, claims = card.partition("## What is not claimed\n")
    assert claims.lstrip().startswith("<!-- nemo-prune") and word in claims.partition("\n## ")[0]
    assert pack(release, "me/x", allow_residual=True).files[CARD_FILE].decode() == card


def test_images_that_had_nothing_to_be_compared_with_are_no_residual(release):
    rewrite(release, images={"memorized": ImageAverages(3)})
    assert "Published although" not in pack(release, "me/x", allow_residual=True).files[CARD_FILE].decode()


def test_an_export_that_nobody_measured_is_refused_with_its_own_words(release):
    replace(Record.load(release / RECORD_FILE), measured=None).save(release / RECORD_FILE)
    with pytest.raises(PushError, match="Nothing was measured on these files"):
        pack(release, "me/x")


@pytest.mark.parametrize(
    "card", ["---\na: b\n---\n\n# T\n\n## What is not claimed\n\n- x\n", "---\na: b\n---\n# T\n", "T"]
)
def test_the_card_says_it_once_wherever_it_was_edited(card):
    said = with_findings(card, ["this remains"])
    assert said.count("this remains") == 1 and with_findings(said, ["this remains"]) == said
    assert with_findings(said, []) == card and (not card.startswith("---") or said.startswith("---\na: b\n---\n"))


def test_what_was_changed_after_the_export_is_refused(release):
    parcel = pack(release, "me/x")
    parcel.check(lambda done, total: None)
    with (release / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(RecordError, match=WEIGHTS):
        pack(release, "me/x").check(lambda done, total: None)
    NeuronMask.from_neurons([], {MID: 8}).save(release / MASK_FILE)
    with pytest.raises(RecordError, match=f"{WEIGHTS}|{MASK_FILE}"):
        pack(release, "me/x").check(lambda done, total: None)
    (release / "vae" / "config.json").unlink()
    with pytest.raises(RecordError, match=r"vae/config\.json"):
        pack(release, "me/x")
    record = release / RECORD_FILE
    record.write_text(record.read_text().replace('"export_verified": true', '"export_verified": false'))
    with pytest.raises(RecordError, match="changed after the export"):
        pack(release, "me/x")
    record.unlink()
    with pytest.raises(RecordError, match="There is no"):
        pack(release, "me/x")


def test_what_is_not_the_releases_is_refused_and_card_and_licence_are_the_publishers(release, tmp_path):
    (release / CARD_FILE).write_text("---\nlicense: [\n---\n")
    with pytest.raises(PushError, match="metadata"):
        pack(release, "me/x")
    (release / CARD_FILE).write_text("---\nlicense: mit\n---\nmy own words\n")
    (release / "LICENSE-MODEL").write_text("put there by hand")
    assert {"LICENSE-MODEL", CARD_FILE} <= set(pack(release, "me/x").files)
    save_file({}, release / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(PushError, match=r"Weights .*fp16\.safetensors"):
        pack(release, "me/x")
    (release / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (release / ".cache").mkdir()
    (release / ".cache" / "captions.txt").touch()
    with pytest.raises(PushError, match=r"\.cache/captions\.txt"):
        pack(release, "me/x")
    with pytest.raises(PushError, match="nothing at"):
        pack(tmp_path / "nowhere", "me/x")


def test_a_single_file_lies_at_the_root_of_its_repo_and_the_rest_as_in_a_folder(model_folder, mask, tmp_path):
    out = tmp_path / "model.safetensors"
    done = CliRunner().invoke(app, ["export", "--model", str(model_folder), "--mask", str(mask), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rewrite(out)
    parcel = pack(out, "me/x")
    parcel.check(lambda done, total: None)
    assert set(parcel.files) == {out.name, CARD_FILE, RECORD_FILE, MASK_FILE, PLOT_FILE}
    assert (
        set(parcel.sha256) == {out.name, MASK_FILE} and f"me/x/blob/main/{out.name}" in parcel.files[CARD_FILE].decode()
    )
    assert find_mask(out) == ReleaseLayout.of(out).folder / "mask.safetensors"
    (ReleaseLayout.of(out).folder / "notes.txt").touch()
    with pytest.raises(PushError, match=r"notes\.txt"):
        pack(out, "me/x")
