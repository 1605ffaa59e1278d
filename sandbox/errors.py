"""Every error that Warmcell raises, as one tree.

    WarmcellError                      .code (stable, on the wire)  .hint (the cure)  .details (JSON)
    ├ InvalidRequestError (ValueError)
    │ └ UnknownGpuKindError
    ├ UnauthenticatedError             no token, or one that is not valid
    ├ ForbiddenError                   a token without that scope
    ├ UnsupportedOperationError
    ├ NotFoundError (LookupError)
    │ ├ SandboxNotFoundError
    │ ├ SnapshotNotFoundError
    │ ├ ImageNotFoundError
    │ └ SandboxFileNotFoundError
    ├ ConflictError
    │ ├ InvalidTransitionError
    │ └ QueueCancelledError
    ├ CapacityError
    │ ├ NoGpuAvailableError
    │ ├ StorageFullError               a disk, or what a sandbox has of one
    │ └ QuotaExceededError             what a principal may have; details has quota, used
    ├ BackendUnavailableError          a tool, daemon or permission is missing
    ├ BackendError
    │ ├ SandboxStartError
    │ ├ SandboxDiedError               exit_code, oom_killed
    │ ├ TemplateError
    │ ├ ImageBuildError              step, exit_code, output
    │ └ SnapshotError
    │   ├ SnapshotIncompatibleError     expected, found
    │   └ SnapshotCorruptError
    ├ OperationTimeoutError (TimeoutError)
    └ TransportError                   the keeper or a guest cannot be reached
      └ ProtocolError

A process that ends with a non-zero exit code is data, not an error. Drivers catch their library's
errors at the edge; nothing above them sees another library's exception.
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class WarmcellError(Exception):
    """Base of all: a sentence that says what is wrong and a hint that says the cure."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip() if self.message.endswith((".", "!", "?")) else self._joined()

    def _joined(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message

    def to_json(self) -> dict[str, Any]:
        """The wire form `{"code", "message", "hint", "details"}`."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


class InvalidRequestError(WarmcellError, ValueError):
    """The request cannot be understood or lies outside the operator's bounds."""

    code = "invalid_request"


class UnknownGpuKindError(InvalidRequestError):
    """A GPU name that no device of this machine has."""

    code = "unknown_gpu_kind"


class UnauthenticatedError(WarmcellError):
    """Nobody knows who asks: a token is not valid, has expired or was revoked."""

    code = "unauthenticated"


class ForbiddenError(WarmcellError):
    """Whoever asks is known, and may not do that."""

    code = "forbidden"


class UnsupportedOperationError(WarmcellError):
    """This backend or engine declares that it cannot do it; nothing was changed."""

    code = "unsupported"


class NotFoundError(WarmcellError, LookupError):
    """Nothing of that name is there."""

    code = "not_found"


class SandboxNotFoundError(NotFoundError):
    """No sandbox has that id (any more)."""

    code = "sandbox_not_found"


class SnapshotNotFoundError(NotFoundError):
    """No snapshot has that name or id."""

    code = "snapshot_not_found"


class ImageNotFoundError(NotFoundError):
    """No image of that name or digest was built here."""

    code = "image_not_found"


class SandboxFileNotFoundError(NotFoundError):
    """There is no such file in the sandbox."""

    code = "file_not_found"


class ConflictError(WarmcellError):
    """The thing exists, but not in a state in which this can be done."""

    code = "conflict"


class InvalidTransitionError(ConflictError):
    """The lifecycle has no such step."""

    code = "invalid_transition"


class QueueCancelledError(ConflictError):
    """It waited for a GPU, and somebody had it wait no longer."""

    code = "queue_cancelled"


class CapacityError(WarmcellError):
    """The machine, or the operator's cap, has no room now."""

    code = "capacity"


class NoGpuAvailableError(CapacityError):
    """Devices of that kind exist but all are leased or busy."""

    code = "no_gpu_available"


class StorageFullError(CapacityError):
    """A disk is full, or a sandbox's part of one; what was there before is as it was."""

    code = "storage_full"


class QuotaExceededError(CapacityError):
    """A principal has all that it may have; `details` has quota, used and limit."""

    code = "quota_exceeded"


class BackendUnavailableError(WarmcellError):
    """A tool, a daemon or a permission that the backend needs is missing."""

    code = "backend_unavailable"


class BackendError(WarmcellError):
    """The sandbox itself failed."""

    code = "backend_error"


class SandboxStartError(BackendError):
    """A sandbox could not be brought up; nothing of it is left."""

    code = "sandbox_start"


class SandboxDiedError(BackendError):
    """The sandbox or its kernel ended by itself; `details` has exit_code and oom_killed."""

    code = "sandbox_died"


class TemplateError(BackendError):
    """The fork server of a template crashed; kernels start without it."""

    code = "template_failed"


class ImageBuildError(BackendError):
    """A step of an image failed; nothing was kept. `details` has step, exit_code and the last lines of output."""

    code = "image_build_failed"


class SnapshotError(BackendError):
    """A snapshot could not be made or restored; the last state is as before."""

    code = "snapshot_failed"


class SnapshotIncompatibleError(SnapshotError):
    """It does not fit this machine, or a file that it had open; `details` has expected and found."""

    code = "snapshot_incompatible"


class SnapshotCorruptError(SnapshotError):
    """Its files are not those that were written."""

    code = "snapshot_corrupt"


class OperationTimeoutError(WarmcellError, TimeoutError):
    """Something did not finish in the time it was given; `details` has operation and timeout."""

    code = "timeout"


class TransportError(WarmcellError):
    """The keeper or a guest cannot be reached."""

    code = "unreachable"


class ProtocolError(TransportError):
    """The other side answered something that is not of the protocol."""

    code = "protocol"


def _tree(root: type[WarmcellError]) -> dict[str, type[WarmcellError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_json(data: Mapping[str, Any]) -> WarmcellError:
    """The error that a wire form stands for, by its code; an unknown code gives the base class."""
    kind = _tree(WarmcellError).get(str(data.get("code")), WarmcellError)
    details = data.get("details")
    return kind(
        str(data.get("message", "unknown error")),
        hint=str(data.get("hint", "")),
        details=details if isinstance(details, Mapping) else None,
    )


STATUS: Mapping[type[WarmcellError], int] = {
    InvalidRequestError: 400,
    UnauthenticatedError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    ConflictError: 409,
    UnsupportedOperationError: 501,
    QuotaExceededError: 429,
    StorageFullError: 507,
    CapacityError: 503,
    BackendUnavailableError: 503,
    OperationTimeoutError: 504,
}
"""HTTP status of each branch of the tree; 500 for what is not listed."""


def http_status(error: WarmcellError) -> int:
    """The HTTP status that stands for this error, that of its nearest listed ancestor."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
