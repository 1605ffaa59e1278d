"""The error tree and its wire form."""

import pytest

from warmcell.sandbox import errors


def every_error() -> list[type[errors.WarmcellError]]:
    found, todo = [], [errors.WarmcellError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo.extend(kind.__subclasses__())
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_codes_are_unique_and_all_are_drawn_in_the_tree() -> None:
    """A code stands for one class, and the module's docstring shows every class."""
    kinds = every_error()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert errors.__doc__ is not None
    assert [kind.__name__ for kind in kinds if kind.__name__ not in errors.__doc__] == []


@pytest.mark.parametrize("kind", every_error())
def test_an_error_survives_the_wire(kind: type[errors.WarmcellError]) -> None:
    """Class, message, hint and details come back from the wire form."""
    back = errors.from_json(kind("It broke.", hint="Mend it.", details={"a": 1}).to_json())
    assert type(back) is kind
    assert (back.message, back.hint, back.details) == ("It broke.", "Mend it.", {"a": 1})
    assert str(back) == "It broke. Mend it."


def test_an_unknown_code_is_still_an_error_with_its_text() -> None:
    """A newer keeper's error keeps its words here."""
    back = errors.from_json({"code": "from_the_future", "message": "m", "hint": "h"})
    assert type(back) is errors.WarmcellError
    assert str(back) == "m. h"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.UnknownGpuKindError, 400),
        (errors.SandboxNotFoundError, 404),
        (errors.InvalidTransitionError, 409),
        (errors.NoGpuAvailableError, 503),
        (errors.StorageFullError, 507),
        (errors.BackendUnavailableError, 503),
        (errors.OperationTimeoutError, 504),
        (errors.UnsupportedOperationError, 501),
        (errors.SandboxDiedError, 500),
    ],
)
def test_http_status_is_that_of_the_nearest_ancestor(kind: type[errors.WarmcellError], status: int) -> None:
    """One table decides the status of the whole tree."""
    assert errors.http_status(kind("m")) == status


def test_errors_are_the_builtins_they_resemble() -> None:
    """`except TimeoutError` and friends work without knowing Warmcell."""
    assert issubclass(errors.OperationTimeoutError, TimeoutError)
    assert issubclass(errors.InvalidRequestError, ValueError)
    assert issubclass(errors.NotFoundError, LookupError)
