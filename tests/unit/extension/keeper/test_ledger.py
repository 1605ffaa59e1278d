"""The ledger of kernels: what a keeper leaves to the next one, and what is said of kernels that are lost."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from warmcell.extension.keeper.ledger import LOST_KEPT_S, KernelNote, Ledger, SessionNote

SESSION = SessionNote(id="s1", path="work.ipynb", name="work.ipynb")
NOTE = KernelNote(kernel_id="k1", server="/home/ada", notebook="/home/ada/work.ipynb", sessions=(SESSION,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kernels.json"


def next_keeper(path: Path, *, taken_up: tuple[str, ...] = ()) -> Ledger:
    """The ledger as a keeper has it that has just come up, and could take up these kernels."""
    ledger = Ledger(path)
    ledger.open()
    for kernel_id in taken_up:
        ledger.take_up(kernel_id)
    ledger.lose_rest()
    return ledger


def test_a_kernel_that_is_taken_up_keeps_its_sessions(path: Path) -> None:
    """The next keeper has the note as it was, and nothing is lost."""
    Ledger(path).put(NOTE)
    ledger = next_keeper(path, taken_up=("k1",))
    assert ledger.sessions("k1") == (SESSION,)
    assert ledger.lost() == []
    assert ledger.loss("k1", NOTE.server, NOTE.notebook) is None


def test_a_kernel_that_nobody_has_is_lost_until_its_notebook_has_another(path: Path) -> None:
    """The loss outlives keepers, is told to the same kernel and the same notebook alone, and then is over."""
    Ledger(path).put(NOTE)
    for _ in range(2):
        ledger = next_keeper(path)
        assert [note.kernel_id for note in ledger.lost()] == ["k1"]
    for kernel_id, notebook in (("k1", None), ("k2", NOTE.notebook)):
        told = ledger.loss(kernel_id, NOTE.server, notebook)
        assert told is not None
        assert (told.code, told.details) == ("sandbox_died", {"kernel_id": "k1"})
    assert ledger.loss("k2", NOTE.server, None) is None
    assert ledger.loss("k2", "/home/bob", NOTE.notebook) is None
    ledger.put(KernelNote(kernel_id="k2", server=NOTE.server, notebook=NOTE.notebook))
    assert [note.kernel_id for note in next_keeper(path, taken_up=("k2",)).lost()] == []


def test_why_a_kernel_could_not_be_saved_is_told(path: Path) -> None:
    """The keeper's reason, known before it ended, is what the next one says."""
    ledger = Ledger(path)
    ledger.put(NOTE)
    ledger.lose("k1", "The disk is full")
    told = next_keeper(path).loss("k1", None, None)
    assert told is not None
    assert told.message.endswith("The disk is full")


def test_a_kernel_that_was_ended_leaves_nothing(path: Path) -> None:
    """Without kernels there is no file, so that no keeper is started for nothing."""
    ledger = Ledger(path)
    ledger.put(NOTE)
    ledger.drop("k1")
    ledger.drop("k1")
    assert not path.exists()


def test_a_loss_that_nobody_asks_for_is_forgotten(path: Path) -> None:
    """After a month."""
    gone = KernelNote(kernel_id="k1", why="x", lost_at=time.time() - LOST_KEPT_S - 1)
    path.write_text(json.dumps({"kernels": [gone.to_json()]}))
    assert next_keeper(path).lost() == []


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"kernels": [{"colour": "red"}]}', '{"kernels": 7}'])
def test_a_broken_ledger_hinders_nothing(path: Path, broken: str) -> None:
    """It is logged, and the keeper begins anew."""
    path.write_text(broken)
    ledger = next_keeper(path)
    assert ledger.lost() == []
    ledger.put(NOTE)
    assert next_keeper(path).lost()[0].kernel_id == "k1"


def test_a_ledger_that_cannot_be_written_hinders_nothing(tmp_path: Path) -> None:
    """What it says in this keeper holds all the same."""
    ledger = Ledger(tmp_path / "absent" / "kernels.json")
    ledger.put(NOTE)
    assert ledger.sessions("k1") == (SESSION,)


def test_what_is_known_already_is_not_written_again(tmp_path: Path) -> None:
    """A restart changes nothing of a kernel's note, and waits for no disk; what could not be written is tried again."""
    path = tmp_path / "state" / "kernels.json"
    ledger = Ledger(path)
    ledger.put(NOTE)  # There is no such directory yet.
    path.parent.mkdir()
    ledger.put(NOTE)
    written = path.stat().st_ino
    ledger.put(replace(NOTE))
    assert path.stat().st_ino == written
    ledger.put(replace(NOTE, notebook="/home/ada/other.ipynb"))
    assert path.stat().st_ino != written
    assert next_keeper(path, taken_up=("k1",)).loss("k2", NOTE.server, "/home/ada/other.ipynb") is None
    assert next_keeper(path).loss("k2", NOTE.server, "/home/ada/other.ipynb") is not None
