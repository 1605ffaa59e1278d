"""Where a guest finds its home."""

from pathlib import Path

import pytest

from warmcell.sandbox.backends.places import leads_home


@pytest.mark.parametrize(
    ("home", "trees", "leads"),
    [
        ("/home/warmcell", [], True),
        ("/home/warmcell", ["/home/users/data"], True),
        ("/home/user", [], False),
        ("/home/warmcell", ["/home/user"], False),
        ("/home/warmcell", ["/home/user/project"], False),
        ("/home/warmcell", ["/home"], False),
    ],
)
def test_other_programs_home_leads_to_the_home_unless_something_is_there(
    home: str, trees: list[str], leads: bool
) -> None:
    """A link takes nobody's place, and nothing lies behind it."""
    assert leads_home(home, map(Path, trees)) is leads
