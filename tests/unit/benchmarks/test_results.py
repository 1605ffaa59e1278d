"""Rows, stored results and the tables that documents show of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Result, User
from benchmarks.rows import Engine, Row, Series, Unit, medians, phases


def row(
    ours: tuple[float, ...] = (0.1, 0.2, 0.3), goal: float | None = 0.15, engine: Engine = "template", unit: Unit = "s"
) -> Row:
    return Row(
        promise="P1",
        what="new kernel",
        engine=engine,
        baseline=Series(what="plain", samples=(1.0, 0.9, 5.0), unit=unit),
        ours=Series(what="ours", samples=ours, unit=unit),
        goal=goal,
        cold=Series(what="cold", samples=(0.25,)),
        parts_s={"POST": 0.1, "execute": 0.1},
        phases_s={"create": 0.03},
        sizes_bytes={"image": 5 * 2**20},
    )


def result(user: User, at: str, *rows: Row, absent: Mapping[str, str] | None = None) -> Result:
    machine = {"cpu": "C", "cores": 2, "memory_gib": 4.0, "linux": "6", "python": "3", "packages": {}}
    machine["packages"] = {"ipykernel": "7", "torch": "2"}
    return Result(user=user, at=at, machine=machine, load_before=0.1, busy_pct=2.5, rows=rows, absent=absent or {})


def test_the_ratio_is_that_of_the_medians() -> None:
    """One slow sample does not move what is promised."""
    assert row().ratio == pytest.approx(0.2)


@pytest.mark.parametrize(("goal", "kept"), [(0.21, True), (0.19, False), (None, True)])
def test_a_promise_is_kept_up_to_its_goal(goal: float | None, kept: bool) -> None:
    """A row with a goal fails above it; one without cannot fail."""
    assert row(goal=goal).kept is kept


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (19, 19), (20, 19), (100, 95)])
def test_p95_is_a_sample_that_95_percent_do_not_exceed(n: int, rank: int) -> None:
    """It is one of the samples, not something between them."""
    assert Series(what="", samples=tuple(float(one) for one in range(n, 0, -1))).p95 == rank


def test_parts_are_medians_by_name() -> None:
    """Each part has a median of its own."""
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]) == {"a": 2.0, "b": 8.0}
    assert medians([{"a": 1.0}, {"a": 3.0, "b": 7.0}]) == {"a": 2.0, "b": 7.0}
    assert medians([]) == {}


def test_phases_are_told_in_ms_and_stored_in_seconds() -> None:
    """What the keeper tells of several sandboxes becomes one median for each phase."""
    told = [{"phases_ms": {"create": 10.0}}, {"phases_ms": {"create": 30.0}}, {"phases_ms": {"create": 20.0}}]
    assert phases(told) == {"create": 0.02}


def test_a_stored_result_is_read_back(tmp_path: Path) -> None:
    """What is in the file is the whole result, samples included."""
    made = result("root", "2026-01-02T03:04:05+00:00", row(), absent={"P3": "no engine"})
    path = results.store([made], "bench", commit="abc", directory=tmp_path)
    assert path.name == "bench-2026-01-02.json"
    assert results.newest(tmp_path) == [made]


def test_a_result_of_another_format_is_refused(tmp_path: Path) -> None:
    """A file of a later format is not read as if it were of this one."""
    path = results.store([result("root", "2026-01-02T03:04:05+00:00", row())], "bench", commit="", directory=tmp_path)
    content = json.loads(path.read_text())
    content["results"][0]["format"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format 3"):
        results.newest(tmp_path)


def test_of_each_kind_of_user_the_newest_is_shown(tmp_path: Path) -> None:
    """A later run as one kind of user replaces that one's numbers and leaves the other's."""
    old = [result("root", "2026-01-02T00:00:00+00:00", row()), result("ordinary", "2026-01-02T00:00:00+00:00", row())]
    new = result("ordinary", "2026-01-03T00:00:00+00:00", row((0.4,)))
    results.store(old, "bench", commit="", directory=tmp_path)
    results.store([new], "again", commit="", directory=tmp_path)
    assert results.newest(tmp_path) == [old[0], new]


def test_the_tables_say_what_was_measured() -> None:
    """Medians with units, ratio, limit and goal; root and ordinary user below each other; then the machine."""
    lines = results.short_table(
        [result("root", "2026-01-02T00:00:00+00:00", row()), result("ordinary", "2026-01-02T00:00:00+00:00", row())]
    ).splitlines()
    assert lines[2] == "| P1 | new kernel | root | 1.00 s |  |  | 200 ms | **0.20×** (≤ 0.15×) |"
    assert lines[3].startswith("| P1 | new kernel | user |")
    assert lines[-1] == "Medians; 2026-01-02, on C, 2 cores, 4 GiB, Linux 6, Python 3, ipykernel 7, torch 2."


def test_engines_stand_side_by_side() -> None:
    """Both engines' numbers are in one line, and what no engine changes stands below both."""
    both = result("root", "2026-01-02T00:00:00+00:00", row(), row((0.1,), goal=0.1, engine="criu"))
    assert results.short_table([both]).splitlines()[2] == (
        "| P1 | new kernel | root | 1.00 s | 100 ms | **0.100×** (≤ 0.1×) | 200 ms | **0.20×** (≤ 0.15×) |"
    )
    same = result("root", "2026-01-02T00:00:00+00:00", row(engine="any", goal=None))
    assert results.short_table([same]).splitlines()[2].count("200 ms | **0.20×** |") == 2


def test_memory_is_written_in_mebibytes() -> None:
    """A row of bytes is not taken for seconds."""
    memory = row((20.0 * 2**20,), unit="bytes")
    assert "| 20 MiB |" in results.short_table([result("root", "2026-01-02T00:00:00+00:00", memory)])


def test_the_long_table_has_phases_sizes_and_what_is_absent() -> None:
    """Cold numbers, phases and sizes have columns; what was not measured is said with its reason."""
    table = results.long_table([result("root", "2026-01-02T00:00:00+00:00", row(), absent={"P3": "no engine"})])
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert cells[7:13] == [
        "250 ms",
        "3",
        "**0.20×** (≤ 0.15×)",
        "POST 100 ms, execute 100 ms",
        "create 30 ms",
        "image 5.0 MiB",
    ]
    assert table.splitlines()[-1] == "- P3, as root: no engine"


def test_a_table_is_put_between_its_markers() -> None:
    """What stood there is replaced, the rest of the document stays, and doing it twice changes nothing."""
    document = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    once = results.replaced(document, "new")
    assert once == f"before\n{results.BEGIN}\nnew\n{results.END}\nafter\n"
    assert results.replaced(once, "new") == once
    with pytest.raises(ValueError, match="no place"):
        results.replaced("nothing here", "new")


def test_documents_show_the_newest_stored_results() -> None:
    """No number in a document is one that no file has."""
    for path, content in results.documents(results.newest()).items():
        assert path.read_text() == content, f"run: python -m benchmarks --tables ({path.name} is not what is stored)"
