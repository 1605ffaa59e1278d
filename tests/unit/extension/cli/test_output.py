"""Tables, spans of time, and errors on a terminal."""

import json
import os
import sys

import pytest

from warmcell.extension.cli.images import BuildProgress
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


def test_a_build_on_a_terminal_is_one_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written over from step to step, says nothing of what steps print, and leaves the line empty."""
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with BuildProgress(verbose=False) as progress:
            for line in ("[1/2] FROM base", "what it prints", "[2/2] RUN true"):
                progress.line(line)
        shown = ""
        while shown.count("\x1b[K") < 3:  # A terminal gives what it has, line by line.
            shown += os.read(ours, 4096).decode()
    os.close(ours)
    first, second, end = shown.split("\x1b[K")[:-1]
    assert first.startswith("\r[ ")
    assert first.endswith("] 0/2 FROM base")
    assert second.startswith("\r[###")
    assert second.endswith("] 1/2 RUN true")
    assert end == "\r"


def test_a_build_that_nobody_watches_is_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    """As in a log."""
    with BuildProgress(verbose=False) as progress:
        for line in ("[1/2] FROM base", "what it prints", "[2/2] RUN true"):
            progress.line(line)
    assert capsys.readouterr().err == "[1/2] FROM base\n[2/2] RUN true\n"
