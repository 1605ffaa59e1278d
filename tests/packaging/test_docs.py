"""What the documents say is there."""

import re

import pytest

from tests.lanes import TOP
from warmcell.extension.config import Warmcell

PAGES = sorted(path for path in [*TOP.glob("*.md"), *TOP.glob("docs/**/*.md"), *TOP.glob("benchmarks/*.md")])


def test_readme_begins_with_a_command() -> None:
    """The first thing to type stands in the README's first 25 lines."""
    first = (TOP / "README.md").read_text().splitlines()[:25]
    assert "$ make lab" in first


def test_every_setting_is_documented() -> None:
    """The operator's page has each `c.Warmcell` setting, and none that is not there."""
    page = (TOP / "docs/howto/operate.md").read_text()
    assert set(re.findall(r"^\| `c\.Warmcell\.(\w+)`", page, re.M)) == set(Warmcell.class_own_traits(config=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_somewhere(page) -> None:  # type: ignore[no-untyped-def]
    """Each relative link of a page names a file that exists."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_picture_is_made_by_a_program_and_shown() -> None:
    """What stands in docs/images is what a browser test or a benchmark writes, all of it, and some page shows it."""
    there = {path.name for path in (TOP / "docs" / "images").iterdir()}
    programs = [*TOP.glob("tests/browser/*.py"), *TOP.glob("benchmarks/**/*.py")]
    made = {name for path in programs for name in re.findall(r"""["/]([\w-]+\.(?:png|svg))["']""", path.read_text())}
    shown = {name for page in PAGES for name in re.findall(r"\]\([^)]*images/([\w-]+\.\w+)\)", page.read_text())}
    assert there == shown
    assert there - made == set()
    assert {name for name in made if name.endswith(".png")} - there == set()


@pytest.mark.parametrize("target", re.findall(r"^\| `make (\w+)", (TOP / "CONTRIBUTING.md").read_text(), re.M))
def test_make_targets_exist(target: str) -> None:
    """Each `make` command that contributors are told of is a rule of the Makefile."""
    assert re.search(rf"^{target}:", (TOP / "Makefile").read_text(), re.M)
