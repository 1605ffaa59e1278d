"""The one error of this package; the helper sends its fields on, and the keeper makes a `WarmcellError` of them."""

from typing import Literal

Code = Literal["snapshot_corrupt", "snapshot_incompatible"]

START_ANEW = "Delete this snapshot and start the kernel anew."


class ImageError(Exception):
    """An image cannot be trusted (`snapshot_corrupt`) or is of a kind that this version does not know.

    Attributes:
        code: A code of `warmcell.sandbox.errors`.
        message: What was found, and where.
        hint: The cure.
    """

    def __init__(self, code: Code, message: str, hint: str = START_ANEW) -> None:
        super().__init__(message)
        self.code: Code = code
        self.message = message
        self.hint = hint


def corrupt(message: str) -> ImageError:
    """An image that is damaged, or was changed by somebody."""
    return ImageError("snapshot_corrupt", message)
