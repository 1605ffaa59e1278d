"""Each of our errors has its status, code and words on each surface: by these clients raise what they should."""

import pytest

from warmcell.extension.server.e2b import failures
from warmcell.extension.server.ports.passing import PortClosedError
from warmcell.sandbox import errors
from warmcell.sandbox.errors import WarmcellError

FULL = errors.CapacityError("No space left", details={"errno": "ENOSPC"})
ASLEEP = errors.ConflictError("It sleeps", details={"state": "suspended"})
WAITS = errors.NoGpuAvailableError("None is free", details={"retry_after_s": 12.4})


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (errors.UnauthenticatedError("Who?"), 401, {}),
        (errors.ForbiddenError("No"), 403, {}),
        (errors.SandboxNotFoundError("Gone"), 404, {}),
        (errors.ConflictError("Paused already"), 409, {}),
        (errors.InvalidRequestError("What?"), 400, {}),
        (errors.QuotaExceededError("Enough"), 429, {"Should-Retry": "false"}),
        (errors.UnsupportedOperationError("No such thing"), 501, {"Should-Retry": "false"}),
        (errors.CapacityError("Full"), 503, {"Should-Retry": "false"}),
        (WAITS, 503, {"Should-Retry": "true", "Retry-After": "13"}),
    ],
)
def test_the_control_plane_says_whether_to_ask_again(
    error: WarmcellError, status: int, headers: dict[str, str]
) -> None:
    """Only where waiting helps; the error has E2B's form and our code."""
    found, body, said = failures.control(error)
    assert (found, said) == (status, headers)
    assert (body["code"], body["error_code"]) == (status, error.code)
    assert str(error) in body["message"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.UnauthenticatedError("Who?"), 401, "unauthenticated"),
        (errors.SandboxFileNotFoundError("Nothing"), 404, "not_found"),
        (errors.InvalidRequestError("What?"), 400, "invalid_argument"),
        (errors.QuotaExceededError("Enough"), 429, "resource_exhausted"),
        (errors.CapacityError("Too many"), 503, "resource_exhausted"),
        (FULL, 507, "resource_exhausted"),
        (ASLEEP, 502, "unavailable"),
        (errors.SandboxNotFoundError("Gone"), 502, "unavailable"),
        (errors.OperationTimeoutError("Late"), 504, "deadline_exceeded"),
        (errors.ConflictError("There", details={"errno": "EEXIST"}), 409, "already_exists"),
        (errors.UnsupportedOperationError("No"), 501, "unimplemented"),
    ],
)
def test_files_and_calls_say_what_is_wrong(error: WarmcellError, status: int, code: str) -> None:
    """Over HTTP by status, over Connect by code; 502 and `unavailable` are of sandboxes that do not run."""
    found, body = failures.data(error)
    told = failures.connect(error)
    assert (found, body["code"], told.code.value) == (status, status, code)
    for words in (body["message"], told.message):
        assert ("was not found" in words) == (status == 502)


def test_a_closed_port_is_told_from_a_sandbox_that_is_gone() -> None:
    """Clients tell by the words alone."""
    status, body = failures.data(PortClosedError("The port is not open: 3000"))
    assert (status, "port is not open" in body["message"]) == (502, True)
