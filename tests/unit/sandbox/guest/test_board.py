"""What ranks have shown and done, and how that is put together for a notebook."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sandbox.guest.ranks import Shell, changes, opens, shows, text
from warmcell.sandbox.guest.magics.board import DATA_MAX, PARTS_MAX, SPANS_MAX, STOPPED, TEXT_MAX, Board, Group, Text
from warmcell.sandbox.guest.magics.groups import CUT, RANKS, Groups
from warmcell.sandbox.guest.magics.widgets import VIEW, Models


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test moves."""
    now = [100.0]
    monkeypatch.setattr("warmcell.sandbox.guest.magics.board.time.monotonic", lambda: now[0])
    return now


def last(shell: Shell) -> dict[str, Any]:
    return shell.published[-1][0]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a\n", "b"], "a\nb"),
        (["10 %\r", "20 %\r", "done\n", "next"], "done\nnext"),
        (["one\r\ntwo"], "one\ntwo"),
        (["50 %\r"], "50 %\r"),
        (["a\rb\rc"], "c"),
        (["kept\n", "10 %", "\r20 %"], "kept\n20 %"),
    ],
)
def test_lines_that_were_written_over_are_left_out(pieces: list[str], expected: str) -> None:
    """As a terminal shows progress bars, in whatever pieces they come."""
    group = Group()
    for piece in pieces:
        group.add(text(piece))
    assert group.parts == [Text("stdout", expected)]


SIZES = st.integers(0, DATA_MAX)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr", ""]), SIZES), max_size=12))
def test_a_group_is_bounded_whatever_is_shown(pieces: list[tuple[str, int]]) -> None:
    """It keeps the end of a flood, of text and of pictures, and says that there was more."""
    group = Group()
    for name, size in [*pieces, ("stdout", TEXT_MAX + 5), ("stderr", TEXT_MAX), ("stdout", 3)]:
        group.add(text("x" * size, name) if name else shows({"image/png": "x" * size}))
    assert sum(len(part.text) for part in group.parts if isinstance(part, Text)) <= TEXT_MAX
    assert sum(len(part.data["image/png"]) for part in group.parts if not isinstance(part, Text)) <= DATA_MAX
    assert group.parts[-1] == Text("stdout", "xxx")
    assert group.cut
    for number in range(2 * PARTS_MAX):
        group.add(text(".", ("stdout", "stderr")[number % 2]))
    assert len(group.parts) <= PARTS_MAX


def test_displays_are_updated_and_cleared_in_their_group() -> None:
    """By their display id, where they are."""
    group = Group()
    group.add(shows({"text/plain": "one"}, display_id="d"))
    group.add(shows({"text/plain": "two"}))
    group.add(shows({"text/plain": "new"}, "update_display_data", display_id="d"))
    assert [part.data for part in group.parts if not isinstance(part, Text)] == [
        {"text/plain": "new"},
        {"text/plain": "two"},
    ]
    group.add({"msg_type": "clear_output", "content": {"wait": False}})
    assert group.parts == []


def test_a_rank_has_its_time_and_how_each_task_ended(clock: list[float]) -> None:
    """Seconds in which it worked, a bar for each task; at the end nothing runs any more."""
    board = Board(["A100", "A100", "A100"], gpus_each=1)
    board.begin(0, "files[0]")
    clock[0] += 2
    board.end(0, "")
    clock[0] += 1
    board.begin(0, "files[3]")
    board.begin(1, "")
    clock[0] += 4
    board.end(0, "ValueError: no")
    board.finish("failed")
    clock[0] += 1000
    first, second, third = board.groups
    assert (first.state, first.error, first.tasks) == ("failed", "ValueError: no", 2)
    assert first.bars(board.now()) == [(100, 102, "done"), (103, 107, "failed")]
    assert (second.state, second.seconds(board.now()), third.state) == (STOPPED, 4, "waits")
    assert board.summary() == "3 ranks · failed · 7.0 s, 10.0 GPU-seconds · 0.0 MiB sent"


def test_many_tasks_share_bars(clock: list[float]) -> None:
    """Neither a notebook nor a page has to keep ten thousand; failures among them are still seen."""
    group = Group()
    for number in range(5000):
        group.begin("", clock[0])
        clock[0] += 1
        group.end("no" if number == 4000 else "", clock[0])
    assert len(group.spans) <= 2 * SPANS_MAX
    assert group.seconds(clock[0]) == 5000
    assert (4100.0, 4101.0, "failed") in group.spans


def test_groups_are_one_display_that_changes() -> None:
    """Shown once and then updated: for our page, as HTML in which text is no markup, and as text."""
    shell, board = Shell(), Board(["CPU", "CPU"])
    groups = Groups(shell, board)  # type: ignore[arg-type]
    groups.tick()
    assert not shell.published  # What is over at once is shown once.
    groups.close("")
    for name, rank, what in (
        ("begin", 0, ""),
        ("message", 0, text("\x1b[31m<script>\x1b[0m")),
        ("message", 0, shows({"text/html": "<b>rich</b>", "text/plain": "rich"})),
        ("message", 0, {"msg_type": "usage", "content": {"memory_bytes": 3 * 2**20, "vram_bytes": 2**30}}),
        ("end", 0, ""),
        ("end", 1, "ValueError: gone"),
    ):
        getattr(board, name)(rank, what)
        getattr(groups, name)(rank, what)
    board.finish("failed")
    groups.close("")
    assert [said["update"] for _, said in shell.published][:2] == [False, True]
    assert len({json.dumps(said["transient"]) for _, said in shell.published}) == 1
    assert "── Rank 0 · done · CPU · 0.0 s · 3 MiB · 1,024 MiB of GPU memory\n" in last(shell)["text/plain"]
    assert "ValueError: gone\n2 ranks · failed" in last(shell)["text/plain"]
    assert "&lt;script&gt;" in last(shell)["text/html"]
    assert "<b>rich</b>" in last(shell)["text/html"]
    told = json.loads(json.dumps(last(shell)[RANKS]))
    assert [one["state"] for one in told["ranks"]] == ["done", "failed"]
    assert told["ranks"][0]["memory_bytes"] == 3 * 2**20
    assert [one["vram_bytes"] for one in told["ranks"]] == [2**30, 0]
    assert [list(part) for part in told["ranks"][0]["parts"]] == [["name", "text"], ["data", "metadata"]]


def test_much_output_is_shown_less_often(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """What says nothing is shown each second, and what has much to say not ten times a second."""
    monkeypatch.setattr("warmcell.sandbox.guest.magics.groups.time.monotonic", lambda: clock[0])
    shell, board = Shell(), Board(["CPU"] * 4)
    groups = Groups(shell, board)  # type: ignore[arg-type]
    board.begin(0, "")
    groups.tick()
    for _ in range(100):
        clock[0] += 0.05
        groups.tick()
    assert len(shell.published) == pytest.approx(6, abs=1)
    for rank in range(4):
        board.message(rank, text("z" * TEXT_MAX))
    groups.tick()
    before = len(shell.published)
    for _ in range(20):
        clock[0] += 0.05
        board.message(0, text("z" * TEXT_MAX))
        groups.tick()
    assert len(shell.published) - before < 5
    assert CUT in last(shell)["text/plain"]


def test_progress_bars_of_widgets_are_seen(clock: list[float]) -> None:
    """A bar in its box, as tqdm makes it, moves within its rank; what is closed is gone; others are text."""
    board = Board(["CPU", "CPU"])
    shell = Shell()
    for message in (
        opens("left", _model_name="HTMLModel", value="Epoch <1>:"),
        opens("bar", _model_name="FloatProgressModel", value=0.0, min=0, max=8, bar_style=""),
        opens("box", _model_name="HBoxModel", children=["IPY_MODEL_left", "IPY_MODEL_bar", "IPY_MODEL_unknown"]),
        shows({VIEW: {"model_id": "box"}, "text/plain": "HBox()"}),
        changes("bar", value=2.0, bar_style="danger"),
        changes("other", value=5),
    ):
        board.message(0, message)
    groups = Groups(shell, board)  # type: ignore[arg-type]
    groups.close("")
    shown = last(shell)
    assert "Epoch : 25 %" in shown["text/plain"]
    assert "value='0.2500'" in shown["text/html"]
    assert VIEW not in json.dumps(shown)
    board.message(0, {"msg_type": "comm_close", "content": {"comm_id": "bar"}})
    groups.close("")
    assert "25 %" not in last(shell)["text/plain"]


@pytest.mark.parametrize(
    "state",
    [
        {"value": None},
        {"value": "x", "max": "y"},
        {"value": 1, "max": 0, "min": 0},
        {"value": 0, "max": 1, "bar_style": "info"},
        {"value": float("nan")},
    ],
)
def test_progress_without_an_end_has_none(state: dict[str, Any]) -> None:
    """It is a bar that moves without a number, and nothing fails of it."""
    models = Models()
    models.hear(opens("m", _model_name="IntProgressModel", **state))
    data = models.bundle({VIEW: {"model_id": "m"}, "text/plain": "IntProgress()"})
    assert "<progress" in data["text/html"]
    assert "nan" not in data["text/html"]


def test_boxes_that_hold_themselves_end() -> None:
    """A remote kernel may say anything."""
    models = Models()
    models.hear(opens("m", _model_name="VBoxModel", children=["IPY_MODEL_m", "IPY_MODEL_m", 5]))
    assert models.bundle({VIEW: {"model_id": "m"}, "text/plain": "VBox()"}) == {"text/plain": "VBox()"}


def test_another_viewer_can_be_told_all() -> None:
    """Whoever looks later sees widgets as they are then."""
    first, second = Models(), Models()
    first.hear(opens("m", _model_name="LabelModel", value="before"))
    first.hear(changes("m", value="<now>"))
    for message in first.opened():
        second.hear(message)
    view = {VIEW: {"model_id": "m"}}
    assert second.bundle(view) == first.bundle(view) == {"text/plain": "<now>", "text/html": "<span>&lt;now&gt;</span>"}
