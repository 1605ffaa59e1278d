"""The clones that a cell makes are seen, opened and ended in the list of sandboxes."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Lab
from tests.browser.notebook import CELL_TIMEOUT_MS, START_TIMEOUT_MS, Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap, pytest.mark.criu]

CELLS = ("import warmcell\nkept = 7\nf = warmcell.fork(2)\nprint('forked')", "print('rank', f.rank, 'kept', kept)")


def test_clones_of_a_cell_are_listed_opened_and_ended(places: Places, page: Page) -> None:
    """One is opened as a notebook with its variables, and outlives the other two kernels."""
    with Lab(places, settings={"prepared": 0}) as lab:
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        lab.notebook("work.ipynb", *CELLS, kernel="plain", display_name="Plain")
        notebook = Notebook.open(page, lab, "work.ipynb")
        notebook.wait_ready()
        notebook.run(0, expected="forked")
        page.get_by_role("tab", name=re.compile("^Running Terminals and Kernels")).click()
        clones = page.locator(".wc-Sandboxes-row").filter(has_text="Clone of work.ipynb")
        expect(clones).to_have_count(2, timeout=START_TIMEOUT_MS)

        clones.first.get_by_role("button", name="Clone of work.ipynb", exact=True).click()
        copy = Notebook(page, "work-Fork1.ipynb")
        copy.wait_shown()
        copy.wait_ready(re.compile(r"CPU · fork · \d"))
        copy.run(1, expected="kept 7")
        expect(clones).to_have_count(1, timeout=START_TIMEOUT_MS)

        clones.first.get_by_role("button", name="Stop Clone of work.ipynb").click()
        expect(clones).to_have_count(0, timeout=CELL_TIMEOUT_MS)
        assert set(lab.sessions()) == {"work.ipynb", "work-Fork1.ipynb"}
        assert len(lab.states()) == 2
