"""Which headers go to what listens in a sandbox, and which come back. Nothing here knows a request but by its parts.

Whatever listens there is trusted by nobody: it gets no credential of a server's, and what it answers neither sets nor
clears anything of the server's origin.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_plus, urlsplit

Headers = list[tuple[bytes, bytes]]

ONE_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
NOT_TOLD: Final = frozenset(
    {"authorization", "cookie", "host", "origin", "referer", "x-xsrftoken", "x-api-key", "expect"}
)
NOT_TOLD_BEGINNINGS: Final = ("x-forwarded-", "forwarded", "warmcell-", "e2b-", "x-access-token", "sec-fetch-")

NOT_TAKEN: Final = frozenset(
    {
        "alt-svc",
        "clear-site-data",
        "nel",
        "report-to",
        "reporting-endpoints",
        "service-worker-allowed",
        "set-cookie",
        "set-cookie2",
        "strict-transport-security",
        "www-authenticate",
    }
)
"""These act on all of an origin, or ask for credentials in its name."""

SANDBOXED: Final = "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts"
"""A page so marked has an origin that is nobody's: not that of the server whose path it is below."""

CREDENTIALS: Final = frozenset({"_xsrf", "ticket"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a port is shown."""

    port: int
    scheme: str
    host: str
    """As the browser names it."""
    seen_as: str = ""
    """The host that what listens there sees in requests. Empty: `localhost` and its port."""
    tls: bool = False
    """Whether it is spoken to with TLS."""
    prefix: str = ""
    """The path of the server that stands for `/` there. Empty: it has an origin of its own."""
    authorized: bool = False
    """Whether the request's Authorization is a token of what listens there, and known to be."""

    @property
    def own_origin(self) -> bool:
        """Whether nothing else is below the same origin."""
        return not self.prefix

    @property
    def inner_host(self) -> str:
        """The host as what listens there sees it."""
        return self.seen_as or f"localhost:{self.port}"


def to_port(asked: Sequence[tuple[str, str]], place: Place, *, websocket: bool = False) -> Headers:
    """The headers of a request that go on to the port."""
    kept: Headers = [(b"Host", place.inner_host.encode())]
    listed = {one.strip().lower() for name, value in asked if name.lower() == "connection" for one in value.split(",")}
    not_told = NOT_TOLD - {"authorization"} if place.authorized else NOT_TOLD
    for name, value in asked:
        lower = name.lower()
        if lower == "origin":
            kept.append((b"Origin", f"{'https' if place.tls else 'http'}://{place.inner_host}".encode()))
        elif lower not in ONE_HOP | not_told | listed and not lower.startswith(NOT_TOLD_BEGINNINGS):
            kept.append((name.encode("latin-1"), value.encode("latin-1")))
    said = {"X-Forwarded-Host": place.host, "X-Forwarded-Proto": place.scheme, "X-Forwarded-Prefix": place.prefix}
    kept += [(name.encode(), value.encode("latin-1")) for name, value in said.items() if value]
    if websocket:
        return [*kept, (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    return [*kept, (b"Connection", b"close")]


def from_port(answered: Iterable[tuple[bytes, bytes]], place: Place) -> list[tuple[str, str]]:
    """The headers of an answer that go back to the browser."""
    kept: list[tuple[str, str]] = []
    for raw_name, raw_value in answered:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        lower = name.lower()
        if lower in ONE_HOP | NOT_TAKEN or (lower.startswith("access-control-") and not place.own_origin):
            continue
        kept.append((name, moved(value, place) if lower in ("location", "content-location") else value))
    kept.append(("Referrer-Policy", "no-referrer"))
    if place.own_origin:
        kept.append(("Content-Security-Policy", "frame-ancestors 'self'"))
    else:
        kept.append(("Content-Security-Policy", SANDBOXED))
        kept.append(("Access-Control-Allow-Origin", "*"))  # its own pages' origin is nobody's, and no cookie counts
    return kept


def moved(location: str, place: Place) -> str:
    """A URL that was meant where the port is, as it is where it is shown."""
    try:
        parts = urlsplit(location)
    except ValueError:  # It is no URL, which browsers see as well.
        return location
    here = (place.inner_host, f"localhost:{place.port}", f"127.0.0.1:{place.port}", place.host)
    if parts.netloc and parts.netloc not in here:
        return location
    if parts.scheme not in ("", "http", "https") or not parts.path.startswith("/"):
        return location
    path = parts._replace(scheme="", netloc="").geturl()
    if place.prefix and (path == place.prefix or path.startswith(f"{place.prefix}/")):
        return path
    return place.prefix + "/" + path.lstrip("/")


def bare_query(query: str, *secrets: str) -> str:
    """A query without credentials: neither what browsers are asked to send, nor what is one of `secrets`."""

    def is_secret(pair: str) -> bool:
        name, _, value = (unquote_plus(part) for part in pair.partition("="))
        return name in CREDENTIALS or (name == "token" and (value in secrets or value.startswith("wct_")))

    return "&".join(pair for pair in query.split("&") if not is_secret(pair))


def may_cross(headers: Mapping[str, str], place: Place) -> bool:
    """Whether a request that shows a cookie was made by a page of that very origin, or by nobody's.

    Other sandboxes' pages are of the same site, so that browsers send the cookie with what those ask for, too.
    """
    origin = headers.get("Origin")
    if origin is not None and origin != f"{place.scheme}://{place.host}":
        return False
    site, mode = headers.get("Sec-Fetch-Site", "none"), headers.get("Sec-Fetch-Mode", "navigate")
    return site in ("same-origin", "none") or (mode == "navigate" and headers.get("Sec-Fetch-Dest") != "iframe")
