"""A Jupyter connection file's content, checked."""

import hashlib
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, get_args

from warmcell.sandbox.errors import InvalidRequestError, UnsupportedOperationError
from warmcell.sandbox.paths import SOCKET_PATH_MAX

Channel = Literal["shell", "iopub", "stdin", "control", "hb"]
CHANNELS: Final[tuple[Channel, ...]] = get_args(Channel)
"""In the order of their numbers: a guest's shell socket ends in -1, its hb socket in -5."""

TEMPORARY_SUFFIX = "~"
"""Ends the name of a socket file until it is ready."""

_FORM = "Give a connection file as jupyter_client writes it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where a kernel's clients connect, and the key that they sign with."""

    transport: Literal["ipc", "tcp"]
    ip: str
    """For ipc: what the socket files' names begin with, an absolute path. For tcp: a host address."""
    shell_port: int
    iopub_port: int
    stdin_port: int
    control_port: int
    hb_port: int
    key: bytes = field(repr=False)
    signature_scheme: str = "hmac-sha256"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Connection":
        """Read and check the content of a connection file. Names that are not ours are ignored.

        Raises:
            InvalidRequestError: Something is missing, of the wrong type, or cannot be bound.
            UnsupportedOperationError: It asks for CurveZMQ.
        """
        if not isinstance(data, Mapping):
            raise _malformed(f"is {type(data).__name__}, not an object")
        if data.get("curve_publickey") or data.get("curve_secretkey"):
            raise UnsupportedOperationError(
                "The connection file asks for CurveZMQ, which Warmcell's proxy does not speak",
                hint="Set c.KernelManager.transport_encryption = 'disabled'; sockets are ipc in a private directory.",
            )
        key = data.get("key")
        if isinstance(key, str):
            key = key.encode()
        values = {"signature_scheme": "hmac-sha256", **data, "key": key}
        found: dict[str, Any] = {}
        for each in fields(cls):
            value = values.get(each.name)
            kind = int if each.name.endswith("_port") else bytes if each.name == "key" else str
            if value is None:
                raise _malformed(f"lacks {each.name!r}")
            if not isinstance(value, kind) or isinstance(value, bool):
                raise _malformed(f"has {each.name!r} of the wrong type ({type(value).__name__})")
            found[each.name] = value
        made = cls(**found)
        made._check()
        return made

    def to_json(self) -> dict[str, Any]:
        """The form of a connection file; `key` as text."""
        made = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**made, "key": self.key.decode()}

    def port(self, channel: Channel) -> int:
        """The number of one channel."""
        number = getattr(self, f"{channel}_port")
        assert isinstance(number, int)
        return number

    def path(self, channel: Channel) -> str:
        """Socket file of one channel (ipc only)."""
        return f"{self.ip}-{self.port(channel)}"

    def url(self, channel: Channel) -> str:
        """Address that clients of one channel connect to."""
        if self.transport == "ipc":
            return f"ipc://{self.path(channel)}"
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"tcp://{host}:{self.port(channel)}"

    def _check(self) -> None:
        if self.transport not in ("ipc", "tcp"):
            raise _malformed(f"names the transport {self.transport!r}", hint="Use 'ipc' or 'tcp'.")
        digest = self.signature_scheme.removeprefix("hmac-")
        if digest == self.signature_scheme or digest not in hashlib.algorithms_available:
            raise _malformed(f"names the signature scheme {self.signature_scheme!r}", hint="Use 'hmac-sha256'.")
        ports = [self.port(channel) for channel in CHANNELS]
        if len(set(ports)) != len(ports):
            raise _malformed("gives two channels the same port", hint="Give five different ports.")
        if self.transport == "tcp":
            self._check_tcp(ports)
        else:
            self._check_ipc(ports)

    def _check_tcp(self, ports: list[int]) -> None:
        if not all(0 < port < 65536 for port in ports):
            raise _malformed("has a port outside 1 to 65535", hint="Give five free TCP ports.")
        try:
            ipaddress.ip_address(self.ip)
        except ValueError:
            raise _malformed(f"has the address {self.ip!r}", hint="Give an IP address such as 127.0.0.1.") from None
        if not self.key:
            raise _malformed(
                "has an empty key, so that anyone on the machine could run code through these ports",
                hint="Let Jupyter make a key (leave Session.key alone), or use ipc.",
            )

    def _check_ipc(self, ports: list[int]) -> None:
        if not all(0 < port < 65536 for port in ports):
            raise _malformed("has a port below 1", hint="Give the ports 1 to 5.")
        if not os.path.isabs(self.ip):
            raise _malformed(
                f"has the relative socket path {self.ip!r}",
                hint="Give the KernelManager an absolute connection_file, or set its ip to an absolute path.",
            )
        longest = max(len(os.fsencode(self.path(channel))) for channel in CHANNELS) + len(TEMPORARY_SUFFIX)
        if longest > SOCKET_PATH_MAX:
            raise _malformed(
                f"has socket paths of {longest} bytes, and a Unix socket's path has at most {SOCKET_PATH_MAX}",
                hint="Set JUPYTER_RUNTIME_DIR to a directory with a short path, or use tcp.",
            )


def _malformed(what: str, *, hint: str = _FORM) -> InvalidRequestError:
    return InvalidRequestError(f"The connection file {what}", hint=hint)
