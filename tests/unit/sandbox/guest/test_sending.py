"""What ranks are sent: how much it counts, and what happens with what cannot be."""

from typing import Any, cast

import pytest

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
