"""Where a server takes E2B's requests: below a path of ours, and at its root where only they can be meant."""

import re
from typing import Any, Final

from jupyter_server.utils import url_path_join
from tornado import httputil
from tornado.routing import Matcher, Rule
from tornado.web import Application

from warmcell.extension.config import Warmcell
from warmcell.extension.server.e2b import control, figures, files, filesystem, interpreter, processes, watching
from warmcell.extension.server.e2b.handler import CONTROL, PREFIX, E2bHandler, Verb
from warmcell.sandbox import ids

VERBS: Final[tuple[Verb, ...]] = (
    *figures.VERBS,
    *control.VERBS,
    *files.VERBS,
    *filesystem.VERBS,
    *interpreter.VERBS,
    *processes.VERBS,
    *watching.VERBS,
)


class E2bMatcher(Matcher):
    """Knows a request of E2B's wire: by its path, by the sandbox in its headers or host, by a key or a signature."""

    def __init__(self, base_url: str, hosts: re.Pattern[str] | None) -> None:
        """`base_url` is the server's, `hosts` are those that name a port of a sandbox."""
        self._hosts = hosts
        self._prefix = url_path_join(base_url, PREFIX) + "/"

    def match(self, request: httputil.HTTPServerRequest) -> dict[str, Any] | None:
        """Empty where it is one, None where it is the server's own."""
        headers, path = request.headers, request.path
        meant = (
            path.startswith(self._prefix)
            or "E2b-Sandbox-Id" in headers
            or (self._hosts is not None and self._hosts.fullmatch(request.host.lower()) is not None)
            or ("X-API-KEY" in headers and CONTROL.fullmatch(path) is not None)
            or (path == "/files" and "signature" in request.query_arguments)
        )
        return {} if meant else None


def hosts_of(domain: str, *, alone: bool) -> re.Pattern[str] | None:
    """Hosts that name a port of a sandbox, as `8000-<sandbox>.<domain>` does; None: there are none.

    Args:
        domain: The operator's, of which every name is this server; empty: there is none. Proxies name servers of all
            kinds in that form, so elsewhere it says nothing.
        alone: Whether nothing but sandboxes is served: then what has the form of their ids is one, in any domain.
    """
    if domain:
        return re.compile(rf"(\d{{1,5}})-([a-z0-9]{{1,32}})\.{re.escape(domain.lower())}(:\d+)?")
    return re.compile(rf"(\d{{1,5}})-([a-z0-9]{{{ids.LENGTH}}})\..+") if alone else None


def add_to(application: Application, base_url: str, config: Warmcell, *, alone: bool) -> None:
    """Serve E2B's wire in a server's application, before its own paths; `alone` as of `hosts_of`."""
    hosts = hosts_of(config.port_domain, alone=alone)
    application.settings["warmcell_e2b_hosts"] = hosts
    application.settings["warmcell_e2b_internet"] = config.e2b_internet
    application.settings["warmcell_e2b_public_ports"] = config.e2b_public_ports
    application.settings["warmcell_patience_s"] = config.stalled_after
    application.add_handlers(".*$", [Rule(E2bMatcher(base_url, hosts), E2bHandler, {"verbs": VERBS})])
