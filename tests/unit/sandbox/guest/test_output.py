"""What is shown of remote cells, as far as it needs no kernel."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcell.sandbox.guest.magics.failures import error_of
from warmcell.sandbox.guest.magics.output import GROUP_MAX, WIDGET, Group, Groups, Lines, Progress, Stream


class Shell:
    """A shell as far as output goes: what was published, and whether it is a kernel's."""

    kernel = object()

    def __init__(self) -> None:
        self.published: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.display_pub = self

    def publish(self, data: dict[str, Any], metadata: dict[str, Any] | None = None, **said: Any) -> None:
        self.published.append((data, said))


def text(words: str) -> dict[str, Any]:
    return {"msg_type": "stream", "content": {"name": "stdout", "text": words}}


def shows(data: dict[str, Any], kind: str = "display_data", **transient: str) -> dict[str, Any]:
    return {"msg_type": kind, "content": {"data": data, "transient": transient}}


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a\n", "b"], "a\nb"),
        (["10 %\r", "20 %\r", "done\n", "next"], "done\nnext"),
        (["one\r\ntwo"], "one\ntwo"),
        (["50 %\r"], "50 %"),
        (["a\rb\rc"], "c"),
    ],
)
def test_lines_that_were_written_over_are_left_out(pieces: list[str], expected: str) -> None:
    """As a terminal shows progress bars, in whatever pieces they come."""
    group = Group()
    for piece in pieces:
        group.add(text(piece))
    assert group.plain().rstrip("\r") == expected


@given(st.lists(st.text(max_size=200), max_size=30))
def test_a_group_is_bounded_whatever_is_written(pieces: list[str]) -> None:
    """It keeps the end of a flood, and is shown as HTML in which nothing of the text is markup."""
    group = Group()
    for piece in [*pieces, "x" * (GROUP_MAX + 5)]:
        group.add(text(piece))
    assert len(group.plain()) <= GROUP_MAX
    assert "<script" not in group.rich()


def test_displays_are_updated_and_cleared_in_their_group() -> None:
    """By their display id; HTML before pictures before text."""
    group = Group()
    group.add(shows({"text/plain": "one", "text/html": "<b>one</b>"}, display_id="d"))
    group.add(shows({"text/plain": "two", "image/png": "QUJD"}))
    group.add(shows({"text/plain": "new", "text/html": "<b>new</b>"}, "update_display_data", display_id="d"))
    assert group.plain() == "new\ntwo"
    assert group.rich() == "<b>new</b><img src='data:image/png;base64,QUJD'>"
    group.add({"msg_type": "clear_output", "content": {"wait": False}})
    assert group.plain() == ""


def test_groups_are_one_display_that_changes() -> None:
    """Shown once and then updated, with the last word at the end."""
    shell = Shell()
    groups = Groups(shell, 2)  # type: ignore[arg-type]
    groups.begin(0, "")
    groups.message(0, text("hello"))
    groups.end(0, "")
    groups.end(1, "gone")
    groups.close("that was it")
    assert [said["update"] for _, said in shell.published][:2] == [False, True]
    assert len({json.dumps(said["transient"]) for _, said in shell.published}) == 1
    last = shell.published[-1][0]["text/plain"]
    assert "Rank 0 · done" in last
    assert "Rank 1 · failed" in last
    assert last.endswith("that was it")


def test_a_terminal_has_lines_with_their_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines only, so that those of several ranks do not mix."""
    lines = Lines(2)
    lines.message(0, text("a"))
    lines.message(1, text("b\nc"))
    lines.message(0, text("a\n"))
    lines.end(1, "")
    assert capsys.readouterr().out == "[1] b\n[0] aa\n[1] c\n"


def test_widgets_are_text() -> None:
    """The view of a model that is elsewhere is left out."""
    shell = Shell()
    Stream(shell).message(0, shows({WIDGET: {"model_id": "m"}, "text/plain": "IntSlider()"}))  # type: ignore[arg-type]
    assert shell.published[0][0] == {"text/plain": "IntSlider()"}


def test_progress_is_shown_past_one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for what is quick; then one display that moves, up to its end."""
    now = [0.0]
    monkeypatch.setattr("warmcell.sandbox.guest.magics.output.time.monotonic", lambda: now[0])
    shell = Shell()
    progress = Progress(shell)  # type: ignore[arg-type]
    progress(2**20, 2**22)
    assert shell.published == []
    now[0] = 1.5
    progress(2**21, 2**22)
    progress(2**22, 2**22)
    assert [data["text/plain"] for data, _ in shell.published] == ["Sending: 2 of 4 MiB", "Sending: 4 of 4 MiB"]
    assert [said["update"] for _, said in shell.published] == [False, True]


@pytest.mark.parametrize("name", ["KeyError", "OwnError", "SystemExit", "UnicodeDecodeError", "KeyboardInterrupt"])
def test_errors_have_their_name_and_text(name: str) -> None:
    """A builtin's is caught as that here; what would end an interpreter ends none here."""
    error = error_of({"ename": name, "evalue": "what", "traceback": ["Cell In[1], line 2"]}, where="Rank 3", cell=7)
    assert (type(error).__name__, str(error)) == (name, "what")
    assert isinstance(error, KeyError) == (name == "KeyError")
    assert not isinstance(error, SystemExit)
    assert error._render_traceback_() == ["Rank 3:", "Cell In[7], line 2"]  # type: ignore[attr-defined]
