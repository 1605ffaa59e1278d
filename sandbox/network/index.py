"""The operator's package index, as sandboxes reach it."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.network.rules import Pattern, patterns
from warmcell.sandbox.wire import Secret

PYPI: Final = ("https://pypi.org/simple", "https://files.pythonhosted.org")


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Where packages come from, and who serves them."""

    urls: tuple[str, ...] = ()
    """The first is the index, the others are further ones. Empty: PyPI. A password in them stays on the host."""
    hosts: tuple[str, ...] = ()
    """From which it serves files besides, as in "files.example.com:8443"."""
    certificate: Path | None = None
    """What its servers are checked against besides the usual."""
    private: bool = False
    """Whether its hosts may have private addresses."""

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Its hosts. Raises InvalidRequestError where they are none."""
        return (*(Pattern.read("{}:{}".format(*_place(url))) for url in self.urls or PYPI), *patterns(self.hosts))

    @property
    def headers(self) -> dict[str, dict[str, Secret]]:
        """What shows its servers who asks, by host. Passwords do not go where TLS is not spoken."""
        found = {}
        for url in self.urls:
            parts = urlsplit(url)
            if parts.username is not None and parts.scheme == "https":
                found["{}:{}".format(*_place(url))] = {"authorization": Secret(_basic(parts.username, parts.password))}
        return found

    def variables(self) -> dict[str, str]:
        """What pip and uv read."""
        shown = [_without_user(url) for url in self.urls]
        found = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if shown:
            found |= {"PIP_INDEX_URL": shown[0], "UV_DEFAULT_INDEX": shown[0]}
        if shown[1:]:
            found |= dict.fromkeys(("PIP_EXTRA_INDEX_URL", "UV_INDEX"), " ".join(shown[1:]))
        hosts = [_place(url)[0] for url in shown if url.startswith("http://")]
        return {**found, **({"PIP_TRUSTED_HOST": " ".join(hosts)} if hosts else {})}


def _place(url: str) -> tuple[str, int]:
    """Host and port of an index; raises InvalidRequestError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequestError("The package index has no URL", hint="Mend c.Warmcell.index_url: https://….")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return host, port or (443 if parts.scheme == "https" else 80)


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _basic(user: str, password: str | None) -> str:
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()
