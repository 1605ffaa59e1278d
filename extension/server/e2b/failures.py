"""How each of our errors is told on each surface of E2B's wire, so that its clients raise what they should."""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from warmcell.extension.server.e2b.framing import Code, ConnectError
from warmcell.extension.server.ports.passing import PortClosedError
from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NoGpuAvailableError,
    NotFoundError,
    OperationTimeoutError,
    QuotaExceededError,
    SandboxDiedError,
    SandboxNotFoundError,
    TransportError,
    UnauthenticatedError,
    UnsupportedOperationError,
    WarmcellError,
    http_status,
)

UNRESPONSIVE: Final = "sandbox_snapshot_guest_agent_unresponsive"
"""The code by which clients know that a sandbox was not paused because nothing in it answered."""

GONE: Final = "The sandbox was not found: it has ended, or is paused"
"""The words by which clients know that the sandbox, not the network, is the reason."""

MEANWHILE: Final = (
    "The sandbox was killed while the request was in progress, or its time was over: it was not found any more"
)


def ended_meanwhile() -> SandboxDiedError:
    """The sandbox went while a request to it was served: in the words by which clients know that."""
    return SandboxDiedError(MEANWHILE, hint="Create another one.")


def body(status: int, message: str, error_code: str = "") -> dict[str, Any]:
    """E2B's form of an error."""
    return {"code": status, "message": message, **({"error_code": error_code} if error_code else {})}


def control(error: WarmcellError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of the control plane: the latter say whether to ask again."""
    status = http_status(error)
    headers = {}
    if status >= 429:
        headers["Should-Retry"] = "true" if isinstance(error, NoGpuAvailableError) else "false"
        wait = error.details.get("retry_after_s")
        if isinstance(wait, (int, float)):
            headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return status, body(status, str(error), error.code), headers


def is_gone(error: WarmcellError) -> bool:
    """Whether the sandbox itself is not there to be used."""
    if isinstance(error, (SandboxNotFoundError, SandboxDiedError)):
        return True
    return isinstance(error, ConflictError) and error.details.get("state") in (
        "suspended",
        "suspending",
        "frozen",
        "stopped",
        "failed",
    )


def data(error: WarmcellError) -> tuple[int, dict[str, Any]]:
    """Status and body of what is answered for a sandbox: its files, its interpreter."""
    if is_gone(error):
        return 502, body(502, MEANWHILE if error.message == MEANWHILE else GONE)
    if isinstance(error, PortClosedError):
        return 502, body(502, str(error))
    if isinstance(error, CapacityError) and error.details.get("errno") in ("ENOSPC", "EDQUOT"):
        return 507, body(507, str(error))
    status = http_status(error)
    return status, body(status, str(error))


def connect(error: WarmcellError) -> ConnectError:
    """As the error of a procedure call."""
    if is_gone(error):
        return ConnectError(Code.UNAVAILABLE, GONE)
    if isinstance(error, ConflictError):
        errno = error.details.get("errno")
        return ConnectError(_CONFLICTS.get(str(errno), Code.FAILED_PRECONDITION), str(error))
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), Code.INTERNAL)
    return ConnectError(code, str(error))


_CONFLICTS: Mapping[str, Code] = {
    "EEXIST": Code.ALREADY_EXISTS,
    "ENOTDIR": Code.INVALID_ARGUMENT,
    "EISDIR": Code.INVALID_ARGUMENT,
    "EACCES": Code.PERMISSION_DENIED,
    "EPERM": Code.PERMISSION_DENIED,
    "EROFS": Code.PERMISSION_DENIED,
}

_CODES: Mapping[type[WarmcellError], Code] = {
    InvalidRequestError: Code.INVALID_ARGUMENT,
    UnauthenticatedError: Code.UNAUTHENTICATED,
    ForbiddenError: Code.PERMISSION_DENIED,
    NotFoundError: Code.NOT_FOUND,
    UnsupportedOperationError: Code.UNIMPLEMENTED,
    QuotaExceededError: Code.RESOURCE_EXHAUSTED,
    CapacityError: Code.RESOURCE_EXHAUSTED,
    OperationTimeoutError: Code.DEADLINE_EXCEEDED,
    TransportError: Code.UNAVAILABLE,
}


def unknown_sandbox(sandbox_id: str) -> SandboxNotFoundError:
    """There is none of that id, or none for whoever asks."""
    return SandboxNotFoundError(f"The sandbox {sandbox_id} was not found", hint="List yours, or create one.")


def encoded(what: Any) -> bytes:
    """JSON as it is sent."""
    return json.dumps(what, separators=(",", ":")).encode()
