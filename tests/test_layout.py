"""Where the files of a release are, as a folder, beside a single file, and in a repo of the Hub."""

from pathlib import Path

import pytest

from nemo_prune.files.layout import (
    CARD_FILE,
    GRID_FILE,
    MASK_FILE,
    PLOT_FILE,
    RECORD_FILE,
    RELEASE_FILES,
    ReleaseLayout,
)

PARTS = ("card", "record", "mask", "plot", "grid")


def made(layout, *more):
    """The files of a release on disk, and more of them."""
    paths = [getattr(layout, part) for part in PARTS] + [layout.folder / name for name in more]
    for path in [*paths, *([layout.file] if layout.file else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return layout


def test_a_folder_has_everything_in_it():
    layout = ReleaseLayout.of(Path("a/out"))
    assert layout == ReleaseLayout(Path("a/out")) and layout.file is None
    assert layout.work == Path("a/out.work")
    names = {part: layout.name(getattr(layout, part)) for part in PARTS}
    assert names == {
        "card": "README.md",
        "record": "nemo_prune.json",
        "mask": "nemo_prune/mask.safetensors",
        "plot": "nemo_prune/neurons_per_layer.png",
        "grid": "nemo_prune/before_after.png",
    }
    assert {part: layout.in_repo(getattr(layout, part)) for part in PARTS} == names
    assert layout.in_repo(layout.folder / "unet" / "config.json") == "unet/config.json"


def test_a_single_file_has_everything_else_in_a_folder_beside_it():
    layout = ReleaseLayout.of(Path("a/model.safetensors"))
    assert layout == ReleaseLayout(Path("a/model.nemo_prune"), Path("a/model.safetensors"))
    assert layout.work == Path("a/model.work")
    assert {part: layout.name(getattr(layout, part)) for part in PARTS} == {
        "card": "README.md",
        "record": "nemo_prune.json",
        "mask": "mask.safetensors",
        "plot": "neurons_per_layer.png",
        "grid": "before_after.png",
    }


def test_a_repo_has_a_single_files_release_where_it_has_a_folders():
    folder, single = ReleaseLayout.of(Path("a/out")), ReleaseLayout.of(Path("a/model.safetensors"))
    for part in PARTS:
        assert single.in_repo(getattr(single, part)) == folder.in_repo(getattr(folder, part))
    assert single.in_repo(single.file) == "model.safetensors"
    assert {folder.in_repo(getattr(folder, part)) for part in PARTS} == RELEASE_FILES
    assert {CARD_FILE, RECORD_FILE, MASK_FILE, PLOT_FILE, GRID_FILE} == RELEASE_FILES


@pytest.mark.parametrize(
    ("name", "is_file"),
    [("out", False), ("v1.4", False), ("out.safetensors", True), ("out.ckpt", True), ("out.bin", True)],
)
def test_what_will_be_there_is_told_by_its_name(name, is_file):
    assert (ReleaseLayout.of(Path(name)).file is not None) is is_file


def test_what_is_there_is_told_by_what_it_is(tmp_path):
    (tmp_path / "odd.safetensors").mkdir()
    (tmp_path / "plain").touch()
    assert ReleaseLayout.found(tmp_path / "odd.safetensors") == ReleaseLayout(tmp_path / "odd.safetensors")
    single = ReleaseLayout.found(tmp_path / "plain")
    assert single == ReleaseLayout(tmp_path / "plain.nemo_prune", tmp_path / "plain")
    assert ReleaseLayout.found(tmp_path / "nowhere").file is None


@pytest.mark.parametrize("name", ["out", "model.safetensors"])
def test_all_files_are_listed_under_their_names_in_a_repo(tmp_path, name):
    layout = made(ReleaseLayout.of(tmp_path / name), ".hidden/x", "LICENSE")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").touch()
    (layout.folder / "link").symlink_to(tmp_path / "elsewhere")
    files = layout.files()
    own = {layout.file.name} if layout.file else set()
    assert files.keys() == RELEASE_FILES | own | {".hidden/x", "LICENSE"}
    assert all(path.is_file() and layout.in_repo(path) == listed for listed, path in files.items())
    assert list(files.values()) == sorted(files.values())
