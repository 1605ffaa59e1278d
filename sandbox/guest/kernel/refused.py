"""Why a kernel does not do what the keeper asks of it. The host knows the errors by their names."""

from __future__ import annotations


class RefusedError(Exception):
    """Why there will be no snapshot, or why a restored kernel is not what it should be; and what to do, if known."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConflictError(RefusedError):
    """It cannot be now, because of what goes on."""


class UnsupportedOperationError(RefusedError):
    """It holds what cannot be saved."""


class CapacityError(RefusedError):
    """There is no room for it now."""
