"""What is shown of remote cells, as far as it needs no kernel."""

import pytest

from tests.unit.sandbox.guest.ranks import Shell, changes, opens, shows, text
from warmcell.sandbox.guest.magics.failures import error_of
from warmcell.sandbox.guest.magics.output import Lines, Progress, Stream, Waiting
from warmcell.sandbox.guest.magics.widgets import VIEW


def test_a_terminal_has_lines_with_their_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines only, so that those of several ranks do not mix."""
    lines = Lines(2)
    lines.message(0, text("a"))
    lines.message(1, text("b\nc"))
    lines.message(0, text("a\n"))
    lines.end(1, "")
    assert capsys.readouterr().out == "[1] b\n[0] aa\n[1] c\n"


def test_widgets_that_nobody_can_show_are_text() -> None:
    """The view of a model that is elsewhere is left out."""
    shell = Shell()
    Stream(shell).message(0, shows({VIEW: {"model_id": "m"}, "text/plain": "IntSlider()"}))  # type: ignore[arg-type]
    assert shell.published[0][0] == {"text/plain": "IntSlider()"}


def test_one_ranks_progress_bar_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one display, shown as HTML and text, and its end is shown however soon that comes."""
    now = [100.0]
    monkeypatch.setattr("warmcell.sandbox.guest.magics.output.time.monotonic", lambda: now[0])
    shell = Shell()
    stream = Stream(shell)  # type: ignore[arg-type]
    stream.message(0, opens("bar", _model_name="IntProgressModel", value=0, max=10, description="Work"))
    stream.message(0, shows({VIEW: {"model_id": "bar"}, "text/plain": "IntProgress()"}))
    for value in (1, 2, 10):
        stream.message(0, changes("bar", value=value))
    stream.end(0, "")
    told = [data["text/plain"] for data, _ in shell.published]
    assert (told[0], told[-1]) == ("Work 0 %", "Work 100 %")
    assert len({said["transient"]["display_id"] for _, said in shell.published}) == 1
    assert "value='1.0000'" in shell.published[-1][0]["text/html"]


@pytest.mark.parametrize("doing", ["Sending", "Bringing back"])
def test_progress_is_shown_past_one_second(doing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for what is quick, be it the first or a later one; then one display that moves, up to its end."""
    now = [0.0]
    monkeypatch.setattr("warmcell.sandbox.guest.magics.output.time.monotonic", lambda: now[0])
    shell = Shell()
    progress = Progress(shell, doing)  # type: ignore[arg-type]
    progress(2**20, 2**22)
    assert shell.published == []
    now[0] = 1.5
    progress(2**21, 2**22)
    progress(2**22, 2**22)
    assert [data["text/plain"] for data, _ in shell.published] == [f"{doing}: 2 of 4 MiB", f"{doing}: 4 of 4 MiB"]
    assert [said["update"] for _, said in shell.published] == [False, True]
    now[0] = 100.0
    progress(2**20, 2**22)
    assert len(shell.published) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_without_a_notebook_is_a_line_of_a_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, so that what a script prints stays its own; in a file there is none. Who waits for a GPU says so."""
    now = [0.0]
    monkeypatch.setattr("warmcell.sandbox.guest.magics.output.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    progress, waiting = Progress(None), Waiting(None)
    progress(2**20, 2**22)
    now[0] = 1.5
    progress(2**21, 2**22)
    progress(2**22, 2**22)
    line = "\rSending: 2 of 4 MiB\rSending: 4 of 4 MiB\n"
    assert capsys.readouterr() == ("", line if terminal else "")
    waiting({"request": "A100", "place": 1, "length": 2})
    waiting.close()
    assert capsys.readouterr() == ("", "Waiting for A100: place 1 of 2\nWaited 2 s for GPUs\n")


@pytest.mark.parametrize("name", ["KeyError", "OwnError", "SystemExit", "UnicodeDecodeError", "KeyboardInterrupt"])
def test_errors_have_their_name_and_text(name: str) -> None:
    """A builtin's is caught as that here; what would end an interpreter ends none here."""
    error = error_of({"ename": name, "evalue": "what", "traceback": ["Cell In[1], line 2"]}, where="Rank 3", cell=7)
    assert (type(error).__name__, str(error)) == (name, "what")
    assert isinstance(error, KeyError) == (name == "KeyError")
    assert not isinstance(error, SystemExit)
    assert error._render_traceback_() == ["Rank 3:", "Cell In[7], line 2"]  # type: ignore[attr-defined]
