"""What is put down as used: by whom, while working or idle, and what was given back."""

import contextlib
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import GIB
from warmcell.sandbox.usage import DAY_S, FORMAT, Account, Usage, UsageRow, UsageStore, total


def running(account: Account, at: float, *, idle_s: float = 0.0, gpus: float = 1.0, **read: float) -> Usage:
    memory = read.pop("memory_bytes", None)
    return account.advance(
        at,
        idle_s=idle_s,
        gpus=gpus,
        suspended=False,
        up=True,
        cpu_s=read.pop("cpu_s", None),
        memory_bytes=None if memory is None else int(memory),
    )


def test_time_is_put_down_by_what_was_there_before() -> None:
    """Two GPUs for ten seconds of which it was idle for four, and one for five."""
    account = Account(at=100.0)
    assert running(account, 100.0, gpus=2.0) == Usage()
    used = running(account, 110.0, idle_s=4.0, gpus=1.0)
    assert (used.gpu_active_s, used.gpu_idle_s) == (12.0, 8.0)
    assert (used.wall_active_s, used.wall_idle_s) == (6.0, 4.0)
    assert running(account, 115.0, idle_s=9.0).gpu_idle_s == 5.0


def test_processors_and_memory_are_put_down_as_they_are_read() -> None:
    """Seconds since the last reading, memory as it was then; processes that end take nothing back."""
    account = Account(at=0.0)
    running(account, 0.0, cpu_s=0.0, memory_bytes=2 * GIB)
    used = running(account, 10.0, cpu_s=7.0, memory_bytes=GIB)
    assert (used.cpu_active_s, used.memory_active_gib_s) == (7.0, 20.0)
    used = running(account, 20.0, idle_s=30.0, cpu_s=7.5)
    assert (used.cpu_idle_s, used.memory_idle_gib_s) == (0.5, 10.0)
    assert running(account, 30.0, cpu_s=1.0).cpu_active_s == 0.0


def test_a_suspended_kernel_gives_its_gpus_back() -> None:
    """For as long as it sleeps they count as given back; what it asked for counts if it never had them here."""
    account = Account(at=0.0, asked_gpus=2.0)
    account.advance(0.0, idle_s=0.0, gpus=0.0, suspended=True, up=False)
    assert running(account, 50.0, gpus=3.0) == Usage(suspended_s=50.0, gpu_given_back_s=100.0)
    used = account.advance(60.0, idle_s=60.0, gpus=0.0, suspended=True, up=False)
    assert used.gpu_idle_s == 30.0
    assert running(account, 70.0).gpu_given_back_s == 30.0


def test_what_waits_for_a_gpu_uses_none() -> None:
    """A start in the queue is neither idle nor suspended."""
    account = Account(at=0.0, asked_gpus=1.0)
    account.advance(0.0, idle_s=0.0, gpus=0.0, suspended=False, up=False)
    assert account.advance(99.0, idle_s=0.0, gpus=1.0, suspended=False, up=True) == Usage()


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 200), st.integers(0, 2), st.sampled_from("rsw")), max_size=20)
)
def test_no_second_is_lost_or_counted_twice(steps: list[tuple[float, float, int, str]]) -> None:
    """Whatever happens: the seconds of all states are those that have passed, and none is negative."""
    account, now, used, expected = Account(at=0.0), 0.0, Usage(), 0.0
    state = "w"
    for passed, idle, gpus, after in steps:
        now += passed
        expected += passed if state != "w" else 0.0
        used += account.advance(now, idle_s=idle, gpus=gpus, suspended=after == "s", up=after == "r")
        state = after
    assert used.wall_active_s + used.wall_idle_s + used.suspended_s == pytest.approx(expected, abs=1e-3)
    assert min(used.to_json().values()) >= 0


def row(name: str, gpu: float, *, owner: str = "notebook", notebook: str = "a.ipynb") -> UsageRow:
    return UsageRow(owner=owner, notebook=notebook, sandbox_id=name, usage=Usage(gpu_idle_s=gpu))


def test_sums_are_kept_by_day_and_told_by_what_is_asked(tmp_path: Path) -> None:
    """For each sandbox, notebook or owner, the largest first; days that are past can be left out."""
    store, now = UsageStore(tmp_path / "usage.sqlite"), time.time()
    assert store.rows(by="owner") == []
    store.add([row("one", 1.0), row("two", 2.0), row("c", 9.0, owner="client", notebook="")], at=now)
    store.add([row("one", 4.0)], at=now)
    store.add([row("one", 100.0)], at=now - 3 * DAY_S)
    told = {name: store.rows(by=name, days=2) for name in ("sandbox", "notebook", "owner")}  # type: ignore[arg-type]
    assert [(r.sandbox_id, r.usage.gpu_idle_s) for r in told["sandbox"]] == [("c", 9.0), ("one", 5.0), ("two", 2.0)]
    assert [(r.notebook, r.usage.gpu_idle_s) for r in told["notebook"]] == [("", 9.0), ("a.ipynb", 7.0)]
    assert [(r.owner, r.usage.gpu_idle_s) for r in told["owner"]] == [("client", 9.0), ("notebook", 7.0)]
    assert total(store.rows(by="owner")).gpu_idle_s == 116.0
    assert (tmp_path / "usage.sqlite").stat().st_mode & 0o077 == 0


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    """After more than a year."""
    store, now = UsageStore(tmp_path / "usage.sqlite"), time.time()
    store.add([row("old", 1.0)], at=now - 401 * DAY_S)
    store.add([row("new", 1.0)], at=now)
    assert [each.sandbox_id for each in store.rows(by="sandbox")] == ["new"]


@pytest.mark.parametrize("what", ["later", "garbage", "directory"])
def test_a_file_that_cannot_be_used_is_told_with_its_cure(tmp_path: Path, what: str) -> None:
    """It is never written over: of a later version, no database, or no file."""
    path = tmp_path / "usage.sqlite"
    if what == "later":
        with sqlite3.connect(path) as base:
            base.execute(f"PRAGMA user_version = {FORMAT + 1}")
        base.close()
    elif what == "garbage":
        path.write_text("nonsense" * 1000)
    else:
        path.mkdir()
    with pytest.raises(BackendUnavailableError, match="Move that file away"):
        UsageStore(path).add([row("one", 1.0)], at=0.0)


def test_a_file_that_is_locked_is_told_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the middle of it is an error of ours, and is over when the other is."""
    monkeypatch.setattr("warmcell.sandbox.usage.BUSY_S", 0.0)
    store = UsageStore(tmp_path / "usage.sqlite")
    store.add([row("one", 1.0)], at=0.0)
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.sqlite")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BackendUnavailableError, match="locked"):
            store.add([row("one", 1.0)], at=0.0)
        with pytest.raises(BackendUnavailableError, match="locked"):
            store.rows(by="sandbox")
    store.add([row("one", 1.0)], at=0.0)
