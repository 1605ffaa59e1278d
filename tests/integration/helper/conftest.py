"""A helper and its users."""

from collections.abc import Iterator

import pytest

from tests.conftest import OrdinaryUser
from tests.integration.helper.system import SystemHelper, User
from tests.leaks import Places


@pytest.fixture
def helper(places: Places) -> Iterator[SystemHelper]:
    """A machine's helper; it ends with nothing left of it."""
    made = SystemHelper(places)
    made.start()
    yield made
    assert made.end() == 0


@pytest.fixture
def user(helper: SystemHelper, ordinary_user: OrdinaryUser) -> User:
    """Somebody who uses it."""
    return User(ordinary_user, helper)
