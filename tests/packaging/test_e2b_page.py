"""docs/reference/e2b.md counts the scenarios that there are, and says which of them shows what."""

import re
from pathlib import Path

import pytest

from tests.jupyter.e2b import page
from tests.jupyter.e2b.packages import SPECIAL, scenario_names
from warmcell.extension.server.e2b.routing import VERBS

ROOT = Path(__file__).parents[2]
DEFINED = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)
CALL = re.compile(r"`(GET|POST|PUT|PATCH|DELETE) (/[^`\s]+)`|`((?:process|filesystem)\.\w+/\w+)`")
NAMES = scenario_names(Path(page.__file__).parent / "scenarios.py")
RUN = "Run scripts/e2b-versions."


def test_the_page_counts_what_there_is() -> None:
    """All scenarios with each version, and all of them passed."""
    told = page.counted(page.PAGE.read_text())
    assert list(told) == [versions[0] for versions in page.VERSIONS], RUN
    for version, (passed, of, absent) in told.items():
        assert passed == of == len(NAMES) - len(absent), f"{version}: {RUN}"
        assert set(absent) <= set(NAMES), f"{version}: {RUN}"


def test_each_row_names_tests_that_there_are() -> None:
    """No row without one, but for what is not there; no scenario that no row names; no name that nothing has."""
    found = page.rows(page.PAGE.read_text())
    named = {name for _, names in found for name in names}
    assert [what for what, names in found if not names] == ["`E2B_DEBUG`, `E2B_VOLUME_API_URL`"]
    assert named >= {*NAMES, *SPECIAL}
    tests = {name for file in ROOT.glob("tests/**/test_*.py") for name in DEFINED.findall(file.read_text())}
    assert named - {*NAMES, *SPECIAL} <= tests


def test_each_call_that_is_served_has_a_row() -> None:
    """And each call in a row is served."""
    calls = [call for what, _ in page.rows(page.PAGE.read_text()) for call in CALL.findall(what)]
    plain = [(method or "POST", re.sub(r"\{\w+\}", "x", path or f"/{rpc}")) for method, path, rpc in calls]
    assert len(plain) > 70
    for verb in VERBS:
        served = [path for method, path in plain if method in verb.methods and re.fullmatch(verb.path, path)]
        assert served, verb.path
    for method, path in plain:
        assert any(method in verb.methods and re.fullmatch(verb.path, path) for verb in VERBS), (method, path)


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
