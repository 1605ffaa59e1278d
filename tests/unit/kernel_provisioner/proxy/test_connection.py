"""Connection files: read, checked, written."""

from typing import Any

import pytest

from warmcell.kernel_provisioner.proxy import Connection
from warmcell.sandbox.errors import InvalidRequestError, UnsupportedOperationError

PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
IPC: dict[str, Any] = {
    "transport": "ipc",
    "ip": "/run/k/c",
    "key": "secret",
    "signature_scheme": "hmac-sha256",
    **PORTS,
}
TCP: dict[str, Any] = {**IPC, "transport": "tcp", "ip": "127.0.0.1"}


def test_a_connection_file_is_read_and_written_unchanged() -> None:
    """What jupyter_client writes comes back; names that are not ours are left out."""
    assert Connection.from_json({**IPC, "kernel_name": "warmcell", "jupyter_session": "a.ipynb"}).to_json() == IPC
    assert Connection.from_json({**TCP, "key": b"bytes"}).key == b"bytes"


def test_addresses_are_jupyters() -> None:
    """Where clients connect is what jupyter_client makes of the same file."""
    assert Connection.from_json(IPC).url("control") == "ipc:///run/k/c-4"
    assert Connection.from_json(TCP).url("hb") == "tcp://127.0.0.1:5"
    assert Connection.from_json({**TCP, "ip": "::1"}).url("shell") == "tcp://[::1]:1"


def test_the_key_is_not_shown() -> None:
    """A connection in a log or a traceback does not give the key away."""
    assert "secret" not in repr(Connection.from_json(IPC))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ({name: value for name, value in IPC.items() if name != "iopub_port"}, "lacks 'iopub_port'"),
        ({name: value for name, value in IPC.items() if name != "key"}, "lacks 'key'"),
        ({**IPC, "shell_port": "1"}, "'shell_port' of the wrong type"),
        ({**IPC, "shell_port": True}, "'shell_port' of the wrong type"),
        ({**IPC, "key": 7}, "'key' of the wrong type"),
        ({**IPC, "transport": "pgm"}, "transport 'pgm'"),
        ({**IPC, "signature_scheme": "hmac-nonsense"}, "signature scheme"),
        ({**IPC, "signature_scheme": "sha256"}, "signature scheme"),
        ({**IPC, "shell_port": 2}, "two channels the same port"),
        ({**IPC, "ip": "kernel-ipc"}, "relative socket path"),
        ({**IPC, "ip": "/" + "x" * 110}, "at most 107"),
        ({**IPC, "hb_port": 0}, "below 1"),
        ({**TCP, "hb_port": 70000}, "1 to 65535"),
        ({**TCP, "ip": "somewhere"}, "address 'somewhere'"),
        ({**TCP, "key": ""}, "an empty key"),
    ],
)
def test_what_cannot_be_bound_is_refused_with_the_cure(file: dict[str, Any], says: str) -> None:
    """Each mistake in a connection file has its own message, and a hint."""
    with pytest.raises(InvalidRequestError, match=says) as caught:
        Connection.from_json(file)
    assert caught.value.hint


def test_what_is_no_object_is_refused() -> None:
    """A JSON list is no connection file."""
    with pytest.raises(InvalidRequestError, match="not an object"):
        Connection.from_json([])  # type: ignore[arg-type]


def test_curve_is_not_silently_left_out() -> None:
    """A file that asks for encryption is not served without."""
    with pytest.raises(UnsupportedOperationError, match="CurveZMQ"):
        Connection.from_json({**IPC, "curve_publickey": "x", "curve_secretkey": "y"})
