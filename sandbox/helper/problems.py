"""What the helper answers where it cannot do what it was asked: a code of the error tree, a sentence, its cure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class HelperError(Exception):
    """A refusal or a failure, as it goes over the wire."""

    def __init__(self, code: str, message: str, *, hint: str = "", details: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    def to_json(self) -> dict[str, object]:
        """The wire form."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


def no_room(where: str) -> HelperError:
    """The disk below `where` is full."""
    return HelperError(
        "storage_full",
        f"There is no room for the snapshot: {where} is full",
        hint="Remove snapshots that are no longer needed (`warmcell snapshots ls`), or free some disk space.",
    )


def incompatible(what: str, expected: object, found: object, *, hint: str = "") -> HelperError:
    """The machine or a file is not as it was when the snapshot was taken."""
    return HelperError(
        "snapshot_incompatible",
        f"The snapshot does not fit: {what} was {expected} and is {found}",
        hint=hint or "Start the kernel anew; the snapshot is left as it is.",
        details={"what": what, "expected": str(expected), "found": str(found)},
    )


def corrupt(what: str) -> HelperError:
    """A file of an image is not what was written."""
    return HelperError(
        "snapshot_corrupt",
        f"The snapshot is damaged: {what}",
        hint="Remove it and start the kernel anew; `warmcell snapshots rm` does.",
        details={"what": what},
    )


def not_found(image: str) -> HelperError:
    """There is no such image."""
    return HelperError(
        "snapshot_not_found",
        f"There is no snapshot {image}",
        hint="`warmcell snapshots ls` names those that there are.",
        details={"image": image},
    )
