"""Tables, spans of time, and errors on a terminal."""

import json

import pytest

from warmcell.extension.cli.output import duration, print_table, tell_error
from warmcell.sandbox.errors import NoGpuAvailableError


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-1, "0 s"), (0.9, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90061, "1 d 1 h")],
)
def test_a_span_is_told_in_its_two_largest_units(seconds: float, told: str) -> None:
    """Short enough for a column, exact enough to act on."""
    assert duration(seconds) == told


def test_columns_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    """Each column is as wide as its widest cell, and no line ends in blanks."""
    print_table(("A", "LONG"), [("xxx", "1"), ("y", "")])
    assert capsys.readouterr().out == "A    LONG\nxxx  1\ny\n"


def test_an_error_is_message_and_cure(capsys: pytest.CaptureFixture[str]) -> None:
    """People read it on stderr; programs find the wire form on stdout."""
    error = NoGpuAvailableError("All are in use", hint="Wait.", details={"held": []})
    tell_error(error, as_json=False)
    plain = capsys.readouterr()
    assert (plain.out, plain.err) == ("", "warmcell: All are in use\n  cure: Wait.\n")
    tell_error(error, as_json=True)
    assert json.loads(capsys.readouterr().out)["error"] == error.to_json()
