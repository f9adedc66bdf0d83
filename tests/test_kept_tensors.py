"""Rows that are larger than memory: kept as they come, gone on with after a stop, mapped from their file."""

import sys

import numpy as np
import pytest
import torch

from benchmarks.corpus_memory import anonymous_memory
from nemo_prune.errors import OutputError
from nemo_prune.files.kept_tensors import kept_rows

ROWS = torch.arange(60, dtype=torch.float32).reshape(10, 2, 3)


class Maker:
    """Makes the rows three at a time, and stops like a kill after some."""

    def __init__(self, stop_after=None):
        self.made, self.stop_after = [], stop_after

    def __call__(self, done):
        for start in range(done, len(ROWS), 3):
            if self.stop_after is not None and len(self.made) == self.stop_after:
                raise KeyboardInterrupt
            part = ROWS[start : start + 3]
            self.made.append(len(part))
            yield part


def test_without_a_file_rows_are_in_memory():
    assert torch.equal(kept_rows(None, 10, Maker()), ROWS)


def test_rows_are_made_once_and_mapped(tmp_path):
    path = tmp_path / "rows.npy"
    assert torch.equal(kept_rows(path, 10, Maker()), ROWS)
    again = Maker()
    mapped = kept_rows(path, 10, again)
    assert not again.made and torch.equal(mapped[:5], ROWS[:5])
    # What was not read yet is not in memory: it is read from what the file holds then.
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(7).tobytes())
    assert mapped[-1, -1, -1] == 7


@pytest.mark.parametrize("cut_off", [0, 5, 24, 30])
def test_after_a_stop_the_rows_that_are_missing_are_made(tmp_path, cut_off):
    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        kept_rows(path, 10, Maker(stop_after=2))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - cut_off)
    again = Maker()
    assert torch.equal(kept_rows(path, 10, again), ROWS)
    assert sum(again.made) == {0: 4, 5: 5, 24: 5, 30: 6}[cut_off]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"no rows"), lambda path: np.save(path, ROWS[:4])])
def test_a_damaged_file_or_another_corpus_is_made_anew(tmp_path, damage):
    path, again = tmp_path / "rows.npy", Maker()
    damage(path)
    assert torch.equal(kept_rows(path, 10, again), ROWS)
    assert sum(again.made) == 10


def test_what_can_t_be_written_is_a_named_error(tmp_path):
    with pytest.raises(OutputError, match="can't be written"):
        kept_rows(tmp_path / "missing" / "rows.npy", 10, Maker())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what memory a process has")
def test_rows_are_not_in_memory(tmp_path):
    before, most = anonymous_memory(), []

    def make(done):
        for _ in range(done, 300):
            most.append(anonymous_memory())
            yield torch.rand(1, 250_000)

    rows = kept_rows(tmp_path / "rows.npy", 300, make)
    assert float(rows.mean()) == pytest.approx(0.5, abs=0.001)
    # The file has 300 MB.
    assert max(*most, anonymous_memory()) - before < 60
