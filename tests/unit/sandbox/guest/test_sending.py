"""What ranks are sent: how much it counts, and what happens with what cannot be."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from warmcell.sandbox.guest.magics import store
from warmcell.sandbox.guest.magics.sending import Parcel
from warmcell.sandbox.guest.magics.store import Store
from warmcell.sandbox.guest.values import CannotTravelError


def parcel(limit: int, **values: Any) -> Parcel:
    return Parcel(Store(cast(Any, None), "box", limit), values, (), lambda sent, total: None)


def test_what_variables_share_counts_once() -> None:
    """Two names of one large object are as much as one; two objects are as much as two."""
    large = ["x" * 10_000]
    parcel(15_000, one=large, other={"of": large})
    with pytest.raises(CannotTravelError, match=r"may be sent: (one|other) 9\.8 KiB, (one|other) 9\.8 KiB"):
        parcel(15_000, one=large, other=["y" * 10_000])


def test_an_item_that_is_too_large_says_so() -> None:
    """By its name, as variables do."""
    with pytest.raises(CannotTravelError, match=r"may be sent: item 9\.8 KiB, small"):
        parcel(1024, small=1).load(0, {"item": "x" * 10_000})


class Files:
    """The keeper as far as it hands over files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def new_values(self, sandbox_id: str, number: int, size: int) -> Iterator[int]:
        with open(self._folder / str(number), "xb") as file:
            yield file.fileno()

    @contextlib.contextmanager
    def written_values(self, sandbox_id: str, number: int) -> Iterator[int]:
        with open(self._folder / str(number), "rb") as file:
            yield file.fileno()


@pytest.mark.parametrize("size", [store.SMALL_BYTES // 2, 2 * store.SMALL_BYTES])
def test_a_buffer_is_looked_at_once_however_many_are_there(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent before is not hashed against each; what is there already is found, and not sent again."""
    looked: list[int] = []
    sha256 = store.hashlib.sha256

    def counted(*data: Any) -> Any:
        looked.append(len(data))
        return sha256(*data)

    monkeypatch.setattr(store.hashlib, "sha256", counted)
    kept = store.Store(cast(Any, Files(tmp_path)), "box", 2**30)
    made = [memoryview(bytes([number]) * size) for number in range(8)]
    for number, view in enumerate(made, 1):
        (piece,) = kept.put([view], [None], lambda sent, total: None)
        assert (piece.number, len(looked)) == (number, number)
    (again,) = kept.put([memoryview(bytes(made[2]))], [None], lambda sent, total: None)
    assert (again.number, len(looked), sorted(os.listdir(tmp_path))) == (3, 9, [str(n) for n in range(1, 9)])
