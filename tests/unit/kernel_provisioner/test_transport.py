"""ipc for whoever does not insist on tcp."""

from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager
from traitlets.config import Config

from warmcell.kernel_provisioner.proxy import Connection
from warmcell.kernel_provisioner.transport import settle, socket_prefix
from warmcell.sandbox.paths import Paths


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(runtime=Path("/run/user/1000/warmcell"), state=tmp_path, leases=tmp_path)


def settled(paths: Paths, **made: object) -> KernelManager:
    manager = KernelManager(**made)
    settle(manager, "some-kernel", paths)
    return manager


@pytest.mark.parametrize(
    "made", [{}, {"connection_file": "/a/very/long/path/" + "x" * 100 + ".json"}, {"transport": "ipc"}]
)
def test_sockets_lie_in_a_short_private_directory(paths: Paths, made: dict[str, object]) -> None:
    """However a manager was made, its socket paths fit into a Unix address and are below our own directory."""
    manager = settled(paths, **made)
    assert (manager.transport, manager.ip) == ("ipc", socket_prefix("some-kernel", paths))
    assert Path(manager.ip).parent.parent == paths.kernels
    info = manager.get_connection_info()
    assert Connection.from_json({**info, "key": "k"}).url("shell") == manager._make_url("shell")


def test_a_kernel_id_cannot_lead_elsewhere(paths: Paths) -> None:
    """Clients may choose ids; whatever they choose is one directory below ours, and different ids differ."""
    found = {socket_prefix(name, paths) for name in ("../../etc", "/x", "a" * 500, "a" * 501)}
    assert len(found) == 4
    assert all(Path(prefix).parent.parent == paths.kernels for prefix in found)


@pytest.mark.parametrize(
    "made",
    [
        {"ip": "0.0.0.0"},
        {"ip": "some.host"},
        {"shell_port": 5001},
        {"config": Config({"KernelManager": {"transport": "tcp"}})},
    ],
)
def test_who_insists_on_tcp_gets_it(paths: Paths, made: dict[str, object]) -> None:
    """A port, an address of another interface or a configured transport is a reason."""
    manager = settled(paths, **made)
    assert manager.transport == "tcp"


def test_an_ipc_address_that_was_given_stays(paths: Paths) -> None:
    """Somebody has a reason to look for the sockets there."""
    assert settled(paths, transport="ipc", ip="/tmp/mine").ip == "/tmp/mine"
