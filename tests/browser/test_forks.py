"""A user forks a notebook with its kernel, saves snapshots of it and goes back, all from the Kernel menu."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Lab
from tests.browser.notebook import START_TIMEOUT_MS, Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap, pytest.mark.criu]

CELLS = ("count = 0\nprint('begun')", "count += 1\nprint('count is', count)")


QUIET = ".Toastify { display: none }"
"""No notifications in pictures."""


def test_fork_a_notebook_and_go_back_to_a_snapshot(places: Places, page: Page, pictures: Path) -> None:
    """The fork has the variables, its own kernel and its own session; the original goes back to what it was."""
    with Lab(places, settings={"prepared": 0}) as lab:
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        lab.notebook("work.ipynb", *CELLS, kernel="plain", display_name="Plain")
        notebook = Notebook.open(page, lab, "work.ipynb")
        notebook.wait_ready()
        notebook.run(0, expected="begun")

        notebook.kernel_menu("Snapshots…", exact=True)
        expect(notebook.dialog).to_contain_text("This kernel has no snapshots", timeout=START_TIMEOUT_MS)
        expect(notebook.dialog.get_by_role("button", name="Restore")).to_be_disabled()
        notebook.dialog.get_by_role("button", name="Import…").press("Enter")
        expect(notebook.dialog.get_by_role("alert")).to_contain_text("set c.Warmcell.import_snapshots")
        notebook.dialog.get_by_role("button", name="Close", exact=True).click()
        for name in ("as begun", "a mistake"):
            notebook.kernel_menu("Save Snapshot…")
            notebook.dialog.get_by_role("textbox").fill(name)
            notebook.dialog.get_by_role("button", name="Save").click()
            expect(page.get_by_text(f"Saved “{name}”").first).to_be_visible(timeout=START_TIMEOUT_MS)
        notebook.run(1, expected="count is 1")

        notebook.kernel_menu("Fork Notebook and Kernel")
        fork = Notebook(page, "work-Fork1.ipynb")
        fork.wait_shown()
        fork.wait_ready(re.compile(r"CPU · fork · \d"))
        fork.run(1, expected="count is 2")
        page.screenshot(path=pictures / "fork.png", style=QUIET)
        sessions = lab.sessions()
        assert set(sessions) == {"work.ipynb", "work-Fork1.ipynb"}
        assert len({kernel for _, kernel in sessions.values()}) == 2

        notebook.show("work.ipynb")
        notebook.run(1, expected="count is 2")
        notebook.kernel_menu("Snapshots…", exact=True)
        expect(notebook.dialog.get_by_role("radio")).to_have_count(2, timeout=START_TIMEOUT_MS)
        notebook.dialog.get_by_role("button", name="Remove snapshot a mistake").click()
        notebook.dialog.get_by_role("button", name="Remove", exact=True).click()
        expect(notebook.dialog.get_by_role("radio")).to_have_count(1, timeout=START_TIMEOUT_MS)
        notebook.dialog.get_by_role("button", name="Restore").click()
        expect(page.get_by_text("The kernel is as it was in “as begun”").first).to_be_visible(timeout=START_TIMEOUT_MS)
        notebook.run(1, expected="count is 1")
        assert lab.sessions() == sessions
