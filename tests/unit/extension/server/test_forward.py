"""Which requests a server passes on to the keeper as they are, though pages have a handler of that path."""

from types import SimpleNamespace
from typing import Any

import pytest
from tornado.httputil import HTTPHeaders

from warmcell.extension.server.forward import OfPrograms

TOKEN = {"Authorization": "Bearer wct_1_x"}
ONCE = {"Idempotency-Key": "k"}


@pytest.mark.parametrize(
    ("path", "headers", "passed"),
    [
        ("/sandboxes/x/fork", TOKEN, True),
        ("/tokens", TOKEN, True),
        ("/sandboxes/x/fork", ONCE, True),
        ("/sandboxes/x/fork", {}, False),
        ("/sandboxes/x/fork", {"Authorization": "token of-jupyter"}, False),
        ("/tokens", ONCE, False),
        ("/kernels", ONCE, False),
        ("/sandboxes/x/fork/../../../tokens", ONCE, False),
    ],
)
@pytest.mark.parametrize("base_url", ["/", "/user/ann/"])
def test_what_programs_ask_for_goes_to_the_keeper(
    base_url: str, path: str, headers: dict[str, str], passed: bool
) -> None:
    """All with a token or ticket of Warmcell's own, for the keeper to judge; of Jupyter's users what may come twice."""
    for prefix, expected in ((base_url, passed), ("/elsewhere/", False)):
        asked = {"path": f"{prefix}warmcell/api/v1{path}", "headers": HTTPHeaders(headers)}
        request: Any = SimpleNamespace(**asked, query_arguments={})
        assert (OfPrograms(base_url).match(request) is not None) is expected
        request.query_arguments["ticket"] = [b""]
        assert (OfPrograms(base_url).match(request) is not None) is (prefix == base_url)
