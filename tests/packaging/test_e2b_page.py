"""docs/reference/e2b.md counts the scenarios that there are, and says which of them shows what."""

from pathlib import Path

import pytest

from tests.jupyter.e2b import page
from tests.jupyter.e2b.packages import SPECIAL, scenario_names

NAMES = scenario_names(Path(page.__file__).parent / "scenarios.py")
RUN = "Run scripts/e2b-versions."


def test_the_page_counts_what_there_is() -> None:
    """All scenarios with each version, and all of them passed."""
    told = page.counted(page.PAGE.read_text())
    assert list(told) == [versions[0] for versions in page.VERSIONS], RUN
    for version, (passed, of, absent) in told.items():
        assert passed == of == len(NAMES) - len(absent), f"{version}: {RUN}"
        assert set(absent) <= set(NAMES), f"{version}: {RUN}"


def test_each_scenario_shows_something() -> None:
    """Each is named beside what it shows, and none is that is not there."""
    assert page.shown(page.PAGE.read_text()) == {*NAMES, *SPECIAL}


def test_the_table_is_made_of_a_run() -> None:
    """What failed is counted as that, what a version does not have is named, and what did not run is missed."""
    lines = [
        f'{{"version": ["{versions[0]}", "{versions[1]}"], "name": "{name}", "status": "{status}"}}'
        for versions in page.VERSIONS
        for name, status in (("one", "passed"), ("two", "failed"), ("three", "absent"))
    ]
    made = page.table(lines, ["one", "two", "three"])
    text = f"before\n\n{page.HEAD}\n{page.LINE}\n| old |\n\nafter"
    assert page.replaced(text, made) == f"before\n\n{made}\n\nafter"
    assert all(one == (1, 2, ["three"]) for one in page.counted(made).values())
    with pytest.raises(ValueError, match="has not run three"):
        page.table([line for line in lines if "three" not in line], ["one", "two", "three"])
