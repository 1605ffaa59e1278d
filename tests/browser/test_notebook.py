"""What a notebook user does, in a real browser on a real JupyterLab."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.lab import Lab
from tests.browser.notebook import START_TIMEOUT_MS, Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap]

SIMULATED = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}]

CELLS = (
    "answer = 6 * 7\nprint('the answer is', answer)",
    "%time import torch",
    "import os\nprint('GPUs:', os.environ['WARMCELL_GPUS'])",
    "%%remote send=answer get=double\ndouble = 2 * answer\nprint('elsewhere:', double)",
    "print('brought back:', double)",
)

KEEP_LABELS = """
window.labels = [];
new MutationObserver(() => {
  const label = document.querySelector('.wc-Item-label')?.textContent ?? '';
  if (label !== labels.at(-1)) {
    labels.push(label);
  }
}).observe(document, { subtree: true, childList: true, characterData: true });
"""
"""All that the toolbar says, one after the other."""


def test_open_run_restart_pick_and_run_remotely(places: Places, page: Page, pictures: Path) -> None:
    """From an open notebook to a cell on another sandbox, each step seen in the page."""
    with Lab(places, settings={"simulated_gpus": SIMULATED}) as lab:
        file = lab.notebook("demo.ipynb", *CELLS)
        notebook = Notebook.open(page, lab, "demo.ipynb")
        assert "CPU" in notebook.wait_ready()
        notebook.run(0, expected="the answer is 42")

        lab.wait_warm()
        notebook.restart()
        notebook.wait_ready(re.compile(r"CPU · template · \d"))
        notebook.run(1, expected="Wall time")
        page.screenshot(path=pictures / "restart.png")

        lab.wait_prepared()
        picker = notebook.pick()
        kind = picker.locator("label").filter(has=page.get_by_role("radio", name="A100-SXM4-80GB"))
        expect(kind).to_contain_text("simulated")
        expect(kind).to_contain_text("2 of 2 free")
        kind.get_by_role("radio").check()
        picker.get_by_role("spinbutton", name="How many").fill("2")
        page.screenshot(path=pictures / "picker.png")
        picker.get_by_role("checkbox", name="Keep its variables").uncheck()
        notebook.apply()
        assert "simulated" in notebook.wait_ready(re.compile(r"2 × A100-80GB · template · \d"))
        notebook.run(2, expected="GPUs: A100-SXM4-80GB,A100-SXM4-80GB")

        lab.wait_prepared()
        notebook.run(0, expected="the answer is 42")
        notebook.run(3, expected="elsewhere: 84")
        notebook.run(4, expected="brought back: 84")
        page.screenshot(path=pictures / "notebook.png")

        page.get_by_role("button", name=re.compile("^Save")).first.click()
        expect(page.locator(".jp-mod-dirty")).to_have_count(0)
        remembered = json.loads(file.read_text())["metadata"]["warmcell"]
        assert remembered == {"gpu": "A100-SXM4-80GB:2", "network": "none", "template": "default"}


def test_a_kernel_that_has_started_is_not_said_to_start_again(places: Places, page: Page) -> None:
    """Between its start and its page's knowing its id, while JupyterLab gives its session the notebook's name."""
    held: list[Route] = []
    page.route("**/api/sessions/*", lambda route: held.append(route), times=1)
    page.add_init_script(KEEP_LABELS)
    with Lab(places, settings={"prepared": 0}) as lab:
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        lab.notebook("plain.ipynb", "print('it works')", kernel="plain", display_name="Plain")
        with page.expect_request("**/api/sessions/*", timeout=START_TIMEOUT_MS):
            notebook = Notebook.open(page, lab, "plain.ipynb")
        notebook.wait_ready()
        (renaming,) = held
        assert renaming.request.method == "PATCH"
        renaming.continue_()
        notebook.run(0, expected="it works")
        labels = page.evaluate("window.labels")
        ready = next(n for n, label in enumerate(labels) if "cold start" in label)
        assert not [label for label in labels[ready:] if "starting" in label], labels


def test_a_policy_of_the_kernelspec_outlives_the_picker(places: Places, page: Page) -> None:
    """It may deny what a list of hosts would allow, and the picker shows hosts only: it says nothing of the network
    unless somebody chooses that.
    """
    policy = {"allow": ["*.example.com"], "deny": ["secret.example.com"], "max_bytes": 1000}
    with Lab(places, settings={"prepared": 0}) as lab:
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain", "network": policy})
        file = lab.notebook("policy.ipynb", "print('it works')", kernel="plain", display_name="Plain")
        notebook = Notebook.open(page, lab, "policy.ipynb")
        notebook.wait_ready()
        for choose, expected in ((False, None), (True, "none")):
            picker = notebook.pick()
            picker.get_by_role("spinbutton", name="Memory").fill("3" if choose else "2")
            if choose:
                picker.get_by_role("radio", name="None").check()
            notebook.apply()
            notebook.run(0, expected="it works")
            page.get_by_role("button", name=re.compile("^Save")).first.click()
            expect(page.locator(".jp-mod-dirty")).to_have_count(0)
            assert json.loads(file.read_text())["metadata"]["warmcell"].get("network") == expected
