"""Where a server takes E2B's requests: below a path of ours, and at its root where only they can be meant."""

from typing import Any, Final

from jupyter_server.utils import url_path_join
from tornado import httputil
from tornado.routing import Matcher, Rule
from tornado.web import Application

from warmcell.extension.server.e2b import control, figures, files, filesystem, interpreter, processes, watching
from warmcell.extension.server.e2b.handler import CONTROL, HOST, PREFIX, E2bHandler, Verb

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

    def __init__(self, base_url: str) -> None:
        """`base_url` is the server's."""
        self._prefix = url_path_join(base_url, PREFIX) + "/"

    def match(self, request: httputil.HTTPServerRequest) -> dict[str, Any] | None:
        """Empty where it is one, None where it is the server's own."""
        headers, path = request.headers, request.path
        meant = (
            path.startswith(self._prefix)
            or "E2b-Sandbox-Id" in headers
            or (HOST.match(request.host) is not None)
            or ("X-API-KEY" in headers and CONTROL.fullmatch(path) is not None)
            or (path == "/files" and "signature" in request.query_arguments)
        )
        return {} if meant else None


def add_to(application: Application, base_url: str) -> None:
    """Serve E2B's wire in a server's application, before its own paths."""
    application.add_handlers(".*$", [Rule(E2bMatcher(base_url), E2bHandler, {"verbs": VERBS})])
