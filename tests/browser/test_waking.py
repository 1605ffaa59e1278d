"""A parked notebook in a real browser: what wakes it before its cell is run, and what does not."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Lab
from tests.browser.notebook import START_TIMEOUT_MS, Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap]

SIMULATED = [{"name": "T4", "memory": "16GiB", "used": "1GiB"}]
CELLS = ("count = 0\nprint('begun')", "count += 1\nprint('count is', count)")
PARK_AFTER_S = 6.0


def test_typing_has_a_parked_kernel_go_on(places: Places, page: Page) -> None:
    """Opening its page anew does not. Nothing is run, so the GPU is given back in a while, and more typing takes it once
    more, since the first was a return, and then not again; the cell does, with the variables.
    """
    settings = {"prepared": 0, "simulated_gpus": SIMULATED, "park_after": PARK_AFTER_S, "gpu_yield_after": 0}
    with Lab(places, settings=settings) as lab:
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        lab.notebook("train.ipynb", *CELLS, kernel="plain", display_name="Plain", choice={"gpu": "T4"})
        train = Notebook.open(page, lab, "train.ipynb")
        train.wait_ready(re.compile(r"T4 · cold start · \d"))
        train.run(0, expected="begun")
        parked = re.compile(r"T4 · parked")
        expect(train.item).to_contain_text(parked, timeout=START_TIMEOUT_MS)
        train.reload(lab)
        expect(train.status).to_contain_text("This kernel is parked", timeout=START_TIMEOUT_MS)
        page.wait_for_timeout(1000)  # Whatever a page asks by itself has been asked.
        assert parked.search(train.item.inner_text())

        second = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").nth(1)
        second.locator(".jp-InputArea-editor").click()
        page.keyboard.press("Control+End")
        page.keyboard.type("\n# a thought")
        expect(train.item).to_contain_text(re.compile(r"T4 · unparked · \d"), timeout=START_TIMEOUT_MS)
        expect(train.status).to_have_count(0)
        expect(second.locator(".jp-OutputArea-output")).to_have_count(0)
        expect(train.item).to_contain_text(parked, timeout=START_TIMEOUT_MS)
        page.keyboard.type(" and another")
        expect(train.item).not_to_contain_text(parked, timeout=START_TIMEOUT_MS)
        expect(train.item).to_contain_text(parked, timeout=START_TIMEOUT_MS)
        page.keyboard.type(", and one more")
        with pytest.raises(AssertionError):
            expect(train.item).not_to_contain_text(parked, timeout=2000)
        train.run(1, expected="count is 1")
