"""What a guest says about its kernels' sockets is no path."""

import pytest

from warmcell.sandbox.errors import ProtocolError
from warmcell.sandbox.guest_wire import socket_name


@pytest.mark.parametrize("name", ["k1", ".e1003", "a", "k12345"])
def test_a_name_is_taken(name: str) -> None:
    """Of the kinds that our guests have."""
    assert socket_name({"sockets": name}) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", "a-1", "k1\n", "K1", ".e1.2", "k" * 33, None, 5, ["k1"], "k\x001"]
)
def test_anything_else_is_refused(name: object) -> None:
    """No other directory, no other kind of file, no endless name."""
    with pytest.raises(ProtocolError):
        socket_name({"sockets": name})
