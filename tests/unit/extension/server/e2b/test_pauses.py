"""A pause of a sandbox in which nothing answers: refused as clients know it, where they have asked for that."""

from typing import Any, cast

import pytest

from warmcell.extension.server.e2b import control
from warmcell.extension.server.e2b.fields import Fields
from warmcell.extension.server.e2b.handler import E2bHandler
from warmcell.sandbox.errors import OperationTimeoutError, SandboxDiedError, WarmcellError

SANDBOX = "aaaaaaaaaaaa"


class Request:
    """A request to pause, and a keeper that could not save the sandbox."""

    def __init__(self, body: dict[str, Any], failure: WarmcellError) -> None:
        self.groups = {"sandbox": SANDBOX}
        self.body_stream = self.keeper = self
        self._body, self._failure = body, failure
        self.told: tuple[Any, int] | None = None

    async def fields(self) -> Fields:
        return Fields(self._body)

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        if path.endswith("/suspend"):
            raise self._failure
        return {"id": SANDBOX, "state": "running", "principal": None, "terms": {"tags": {}, "frozen": False}}

    def answer(self, what: Any, status: int = 200) -> None:
        self.told = (what, status)


@pytest.mark.parametrize("failure", [OperationTimeoutError("It does not answer"), SandboxDiedError("It has ended")])
async def test_who_does_not_answer_is_not_paused(failure: WarmcellError) -> None:
    """409 with E2B's own code where a healthy guest is required, which no second pause is; else the error itself."""
    request = Request({"requireHealthyGuest": True}, failure)
    await control.pause(cast(E2bHandler, request))
    assert request.told is not None
    body, status = request.told
    assert (status, body["code"], body["error_code"]) == (409, 409, "sandbox_snapshot_guest_agent_unresponsive")
    request = Request({}, failure)
    with pytest.raises(type(failure)):
        await control.pause(cast(E2bHandler, request))
    assert request.told is None
