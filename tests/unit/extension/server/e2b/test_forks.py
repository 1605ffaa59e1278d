"""A fork of which one copy cannot be had says so for that one: the others are the caller's."""

from typing import Any, cast

from warmcell.extension.server.e2b import control
from warmcell.extension.server.e2b.fields import Fields
from warmcell.extension.server.e2b.handler import E2bHandler
from warmcell.extension.server.e2b.keys import Keys
from warmcell.sandbox.errors import SandboxDiedError

SOURCE, GOOD, BAD = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"


def info(sandbox_id: str) -> dict[str, Any]:
    """As the keeper tells of one."""
    return {"id": sandbox_id, "state": "running", "principal": None, "terms": {"tags": {}, "frozen": False}}


class Request:
    """A request for two copies, and a keeper of whose copies one has ended before it is told its time."""

    def __init__(self) -> None:
        self.groups = {"sandbox": SOURCE}
        self.keys = Keys(b"k" * 32)
        self.body_stream = self.keeper = self
        self.told: tuple[Any, int] | None = None

    async def fields(self) -> Fields:
        return Fields({"count": 2, "timeout": 60})

    async def check_run(self) -> None:
        pass

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        if path.endswith("/fork"):
            assert body == {"n": 2}
            return {"sandboxes": [info(GOOD), info(BAD)]}
        if method == "PATCH" and path.endswith(BAD):
            raise SandboxDiedError("It has ended", hint="Fork again.")
        return info(path.rpartition("/")[2])

    def answer(self, what: Any, status: int = 200) -> None:
        self.told = (what, status)


async def test_one_copy_that_fails_is_told_beside_those_that_do_not() -> None:
    """As E2B has it: a list with a sandbox or an error for each."""
    request = Request()
    await control.fork(cast(E2bHandler, request))
    assert request.told is not None
    (good, bad), status = request.told
    assert (status, good["sandbox"]["sandboxID"]) == (201, GOOD)
    assert bad["error"]["message"].startswith("It has ended")
    assert bad["error"]["code"] >= 400
