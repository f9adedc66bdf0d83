"""Full disks, kills and two at once: a release is there as a whole or not at all."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch

from benchmarks.kills import files_of
from nemo_prune.checkpoint.export import export_checkpoint
from nemo_prune.checkpoint.fingerprint import tensor_digests
from nemo_prune.checkpoint.folder import scan_folder
from nemo_prune.errors import OutputError
from nemo_prune.facts import MaskFacts
from nemo_prune.files.layout import ReleaseLayout
from nemo_prune.files.staging import check_release_target, staged_folder
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.models.source import resolve_model
from nemo_prune.release.from_mask import export_model
from nemo_prune.release.writing import staged_release

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def mask_file(model_folder, tmp_path_factory):
    """A mask of the tiny pipeline, which knows its base."""
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    found = NeuronMask.from_neurons([Neuron(LAYER, 1), Neuron(LAYER, 3)], {LAYER: 8})
    found.save(path, MaskFacts(base_tensors=tensor_digests(scan_folder(model_folder), found)))
    return path


@pytest.fixture(scope="module")
def source(model_folder):
    return resolve_model(str(model_folder))


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of its own, which may be full or read-only even for root."""
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_is_known_before_anything_is_written(source, mask_file, tmp_path):
    with small_disk(tmp_path / "disk", 200) as disk:
        with pytest.raises(OutputError, match="free"):
            export_model(source, mask_file, disk / "out")
        assert not any(disk.iterdir())


def test_a_disk_that_fills_up_at_any_place_leaves_nothing_and_room_mends_it(source, mask_file, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    export_model(source, mask_file, whole := tmp_path / "whole")
    needed = sum(-(-path.stat().st_size // 4096) for path in whole.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", 2048) as disk:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        # Weights come first, then mask, record and card: each is at one time what finds no room.
        for room in (0, needed // 2, *range(needed - 5, needed)):
            (disk / "filler").write_bytes(bytes((512 - room) * 4096))
            with pytest.raises(OutputError, match="No space left"):
                export_model(source, mask_file, disk / "out")
            assert [path.name for path in disk.iterdir()] == ["filler"]
        (disk / "filler").write_bytes(bytes((512 - needed) * 4096))
        export_model(source, mask_file, disk / "out")
        assert files_of(disk / "out") == files_of(whole)


def test_an_old_release_outlives_a_full_disk(source, mask_file, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    with small_disk(tmp_path / "disk", 700) as disk:
        export_model(source, mask_file, disk / "out", scale=0.5)
        before = files_of(disk / "out")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(OutputError, match="No space left"):
            export_model(source, mask_file, disk / "out", overwrite=True)
        assert files_of(disk / "out") == before and len(list(disk.iterdir())) == 1


def test_a_read_only_target_and_one_that_is_mounted_are_refused(source, mask_file, tmp_path):
    with small_disk(tmp_path / "disk", 1024) as disk:
        with pytest.raises(OutputError, match="mounted"):
            export_model(source, mask_file, disk, overwrite=True)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for out in (disk / "out", disk / "new" / "out"):
            with pytest.raises(OutputError, match="not writable"):
                export_model(source, mask_file, out)
        with pytest.raises(OutputError, match="Read-only"):
            NeuronMask.load(mask_file).save(disk / "mask.safetensors")


def test_a_mask_on_a_full_disk_is_none_and_a_log_says_so(tmp_path):
    with small_disk(tmp_path / "disk", 8) as disk:
        (disk / "filler").write_bytes(bytes(4 << 10))
        with pytest.raises(OutputError, match="No space left"):
            NeuronMask({"a": torch.ones(9000, dtype=torch.bool)}).save(disk / "mask.safetensors")
        assert [path.name for path in disk.iterdir()] == ["filler"]
        with pytest.raises(OutputError, match="No space left"):
            LineLog(disk / "log.jsonl").append(["x" * 9000])


@pytest.mark.parametrize("place", [".", "unet", "unet/new", ".."])
def test_a_target_that_would_replace_the_model_is_refused(model_folder, place):
    with pytest.raises(OutputError, match="Choose another --out"):
        check_release_target(model_folder / place, model_folder, 0, overwrite=True)


def in_child(work) -> int:
    """Do some work in a process of its own, whose imports are done."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def killed_at_rename(number: int, work, monkeypatch) -> None:
    """Do some work that is killed when it comes to a rename, counted from 0."""
    rename, left = os.replace, iter(range(number))

    def replace(*places):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*places)

    def killed():
        monkeypatch.setattr(os, "replace", replace)
        work()

    os.waitpid(in_child(killed), 0)


def killed_after(work, seconds: float) -> None:
    child = in_child(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def export(model_folder, mask_file, tmp_path):
    """The weights of an export alone: card and plot take most of the time of a tiny one."""
    mask = NeuronMask.load(mask_file)

    def export(out=tmp_path / "out", scale=0.0, overwrite=False):
        with staged_folder(out, overwrite) as folder:
            export_checkpoint(model_folder, mask, folder, scale)

    return export


def killed_everywhere(export, out, kills) -> int:
    """Kill an export at moments all over its time; returns how often it was writing then."""
    whole = out.with_name("undisturbed")
    os.waitpid(in_child(lambda: export(whole)), 0)
    # The first one also waits for the disk.
    began = time.perf_counter()
    os.waitpid(in_child(lambda: export(out)), 0)
    longest = time.perf_counter() - began
    shutil.rmtree(out)
    expected, moments, writing = files_of(whole), random.Random(0), 0
    for number in range(kills):
        killed_after(lambda: export(out), longest * (number + moments.random()) / kills)
        writing += out.with_name(f".{out.name}.partial").exists()
        if out.exists():
            assert files_of(out) == expected
            shutil.rmtree(out)
        export(out)
        assert files_of(out) == expected
        shutil.rmtree(out)
    assert [path.name for path in out.parent.iterdir()] == [whole.name]
    return writing


def test_at_any_moment_nothing_or_the_whole_release_and_the_next_export_succeeds(export, tmp_path):
    hits = 0
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        # How long an export takes differs, and with it how many kills hit one that is writing.
        hits += killed_everywhere(export, folder / "out", 20)
        if hits > 3:
            break
    assert hits > 3


def test_at_three_moments_of_the_whole_export_too(source, mask_file, tmp_path):
    killed_everywhere(lambda out: export_model(source, mask_file, out), tmp_path / "out", 3)


def test_over_an_older_release_the_old_or_the_new_one_stands(export, tmp_path):
    out, old, new = (tmp_path / name for name in ("out", "old", "new"))
    export(new)
    export(old, scale=0.5)
    stood, moments = [], random.Random(1)
    for _ in range(10):
        shutil.copytree(old, out)
        killed_after(lambda: export(overwrite=True), moments.uniform(0, 0.03))
        stood.append(files_of(out))
        export(overwrite=True)
        assert files_of(out) == files_of(new)
        shutil.rmtree(out)
    assert all(each in (files_of(old), files_of(new)) for each in stood)


@pytest.mark.parametrize(("renames", "stands"), [(0, "old"), (1, None), (2, "new"), (3, "new")])
def test_between_any_two_renames_the_old_one_comes_back_or_the_new_one_stands(
    export, tmp_path, monkeypatch, renames, stands
):
    out = tmp_path / "out"
    export(tmp_path / "new")
    export(out, scale=0.5)
    files = {"old": files_of(out), "new": files_of(tmp_path / "new"), None: {}}
    killed_at_rename(renames, lambda: export(overwrite=True), monkeypatch)
    assert files_of(out) == files[stands]
    with pytest.raises(OutputError, match="--overwrite"):
        export()
    assert files_of(out) == files[stands or "old"]
    export(overwrite=True)
    assert files_of(out) == files["new"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("renames", range(9))
def test_a_single_file_stands_beside_its_own_record_or_not_at_all(tmp_path, monkeypatch, renames):
    out = tmp_path / "model.safetensors"

    def export(content, **options):
        with staged_release(out, **options) as release:
            release.layout.file.write_text(content)
            for name in ("README.md", "nemo_prune.json"):
                (release.layout.folder / name).write_text(content)

    export("old")
    killed_at_rename(renames, lambda: export("new", overwrite=True), monkeypatch)
    if out.exists():
        assert out.read_text() == (ReleaseLayout.of(out).folder / "nemo_prune.json").read_text()
    export("new", overwrite=True)
    assert out.read_text() == (ReleaseLayout.of(out).folder / "nemo_prune.json").read_text() == "new"
    assert set(tmp_path.iterdir()) == {out, ReleaseLayout.of(out).folder}


def test_two_at_once_do_not_touch_each_other(export, tmp_path):
    export(tmp_path / "undisturbed")
    reader, writer = os.pipe()

    def hold():
        with staged_folder(tmp_path / "out") as folder:
            (folder / "mine").touch()
            os.write(writer, b"x")
            time.sleep(60)

    child = in_child(hold)
    os.read(reader, 1)
    with pytest.raises(OutputError, match="Another process"):
        export()
    assert (tmp_path / ".out.partial" / "mine").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    children = [in_child(export) for _ in range(4)]
    for child in children:
        os.waitpid(child, 0)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"undisturbed", "out"}


def test_a_planted_link_beside_the_target_is_not_followed(export, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(OutputError):
        export()
    assert (precious / "thesis.tex").exists()
