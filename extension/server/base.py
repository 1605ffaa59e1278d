"""What all handlers of the page's REST share: the keeper, errors in Warmcell's wire form, bodies."""

import json
from typing import Any

from jupyter_server.base.handlers import APIHandler
from tornado import web

from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.sandbox.errors import InvalidRequestError, UnauthenticatedError, WarmcellError, http_status

AUTH_RESOURCE = "warmcell"
SHOW = "Send `Authorization: Bearer`, with a token of `warmcell token create` or the one that the server printed."


class WarmcellHandler(APIHandler):
    """Errors in Warmcell's wire form."""

    auth_resource = AUTH_RESOURCE

    @property
    def link(self) -> KeeperLink:
        link: KeeperLink = self.settings["warmcell_link"]
        return link

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """`WarmcellError` with its own status, whom Jupyter does not know with its; all else as Jupyter does."""
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        if isinstance(error, WarmcellError):
            status_code = http_status(error)
        elif status_code in (401, 403) and getattr(self, "_current_user", None) is None and self.check_host():
            error = UnauthenticatedError("Nobody is known by what this request shows", hint=SHOW)
        else:
            super().write_error(status_code, **kwargs)
            return
        self.set_status(status_code)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(error.to_json()))

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        """Ours are answers, not accidents."""
        if isinstance(value, WarmcellError):
            self.log.info("%s %s: %s", self.request.method, self.request.path, value)
        else:
            super().log_exception(kind, value, trace)

    def body(self) -> dict[str, Any]:
        """The request's JSON object.

        Raises:
            InvalidRequestError: It is none.
        """
        try:
            body: object = self.get_json_body()
        except (web.HTTPError, RecursionError) as error:
            raise InvalidRequestError("The request is not JSON", hint="Send one JSON object.") from error
        if body is None:
            return {}
        if not isinstance(body, dict):
            raise InvalidRequestError("The request is not a JSON object", hint="Send one JSON object.")
        return body
