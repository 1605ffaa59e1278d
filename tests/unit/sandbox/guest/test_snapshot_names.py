"""The lines of `%snapshot` and `%restore`."""

import pytest

from warmcell.sandbox.guest.magics.arguments import ArgumentError
from warmcell.sandbox.guest.magics.snapshots import parse


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", ""),
        ("  ", ""),
        ("a", "a"),
        (" before-training ", "before-training"),
        ("'two words'", "two words"),
        ("1.2_3", "1.2_3"),
    ],
)
def test_a_name_is_read(line: str, name: str) -> None:
    """One word, or quoted ones; nothing is a list."""
    assert parse("snapshot", line) == name


@pytest.mark.parametrize("line", ["a b", "name=a", "'a", "/etc/passwd", "..", "-x", "é", "a" * 65, "a\nb c", "'a\x00'"])
def test_what_is_no_name_is_refused_with_the_cure(line: str) -> None:
    """The message shows the line or says what a name is made of."""
    with pytest.raises(ArgumentError, match=r"%snapshot|letters, digits|quotation"):
        parse("snapshot", line)
