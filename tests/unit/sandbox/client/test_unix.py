"""The client without a loop, where nobody listens."""

import gc
import socket
import warnings

import httpx
import pytest

from tests.leaks import Places
from warmcell.sandbox.client._api import unreachable
from warmcell.sandbox.client.keeper import SyncKeeperClient
from warmcell.sandbox.errors import BackendUnavailableError, TransportError
from warmcell.sandbox.paths import Paths


def test_a_connection_that_is_refused_leaves_no_socket_open(places: Places) -> None:
    """The keeper goes just as somebody asks: one error, and no descriptor."""
    paths = Paths(places.runtime, places.state, places.leases)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(paths.keeper_socket))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with SyncKeeperClient(paths) as client, pytest.raises(TransportError, match="refused") as raised:
            client.get("/status")
        gc.collect()
    paths.keeper_socket.unlink()
    assert raised.value.hint
    assert [str(one.message) for one in caught if one.category is ResourceWarning] == []


def test_a_directory_that_is_not_absolute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper and its clients would each take it for another."""
    monkeypatch.setenv("WARMCELL_RUNTIME_DIR", "here")
    with pytest.raises(BackendUnavailableError, match="WARMCELL_RUNTIME_DIR") as raised:
        Paths.default()
    assert "slash" in raised.value.hint


def test_a_connection_that_broke_is_said_in_words() -> None:
    """Such an error has no text of its own."""
    assert unreachable(httpx.ReadError("")).message == "The keeper cannot be reached (the connection broke)"
    assert "(refused)" in unreachable(httpx.ConnectError("refused")).message
