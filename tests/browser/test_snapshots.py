"""A user looks after the snapshots of a notebook's kernel: renames, takes out, brings in and removes them."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Lab
from tests.browser.notebook import START_TIMEOUT_MS, Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap, pytest.mark.criu]

CELLS = ("count = 0\nprint('begun')", "count += 1\nprint('count is', count)")


def opened(page: Page, lab: Lab) -> Notebook:
    """A notebook whose kernel has a snapshot "first", taken when `count` was 0."""
    lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
    lab.notebook("work.ipynb", *CELLS, kernel="plain", display_name="Plain")
    notebook = Notebook.open(page, lab, "work.ipynb")
    notebook.wait_ready()
    notebook.run(0, expected="begun")
    notebook.kernel_menu("Save Snapshot…")
    notebook.dialog.get_by_role("textbox").fill("first")
    notebook.dialog.get_by_role("button", name="Save").click()
    expect(page.get_by_text("Saved “first”").first).to_be_visible(timeout=START_TIMEOUT_MS)
    notebook.run(1, expected="count is 1")
    notebook.kernel_menu("Snapshots…", exact=True)
    expect(notebook.dialog.get_by_role("radio")).to_be_focused(timeout=START_TIMEOUT_MS)
    return notebook


def test_a_snapshot_goes_out_as_a_file_and_comes_back(places: Places, page: Page, tmp_path: Path) -> None:
    """Renamed with the keyboard alone, downloaded, removed, imported; the kernel goes back to what it was. A file that
    is no archive is refused, and nothing changes.
    """
    broken = tmp_path / "broken.warmcell"
    broken.write_bytes(b"no archive")
    with Lab(places, settings={"prepared": 0, "import_snapshots": True}) as lab:
        notebook = opened(page, lab)
        dialog = notebook.dialog
        rename = dialog.get_by_role("button", name="Rename snapshot first")
        rename.focus()
        page.locator(".jp-Notebook").first.focus()  # As JupyterLab does by itself where a notebook is just drawn.
        expect(rename).to_be_focused()
        page.keyboard.press("Enter")
        field = dialog.get_by_role("textbox", name="New name of snapshot first")
        expect(field).to_be_focused()
        field.press("Escape")
        expect(rename).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.type("as begun")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("radio", name=re.compile("^as begun"))).to_be_checked(timeout=START_TIMEOUT_MS)
        expect(dialog.get_by_role("button", name="Rename snapshot as begun")).to_be_focused()

        with page.expect_download(timeout=START_TIMEOUT_MS) as download:
            dialog.get_by_role("link", name="Download snapshot as begun").click()
        assert download.value.suggested_filename == "as begun.warmcell"
        archive = tmp_path / "as begun.warmcell"
        download.value.save_as(archive)

        dialog.get_by_role("button", name="Remove snapshot as begun").click()
        dialog.get_by_role("button", name="Keep").click()
        expect(dialog.get_by_role("button", name="Remove snapshot as begun")).to_be_focused()
        page.keyboard.press("Enter")
        dialog.get_by_role("button", name="Remove", exact=True).click()
        expect(dialog).to_contain_text("This kernel has no snapshots", timeout=START_TIMEOUT_MS)
        expect(dialog.get_by_role("button", name="Restore")).to_be_disabled()

        for file in (broken, archive):
            with page.expect_file_chooser() as chooser:
                dialog.get_by_role("button", name="Import…").click()
            chooser.value.set_files(file)
            if file is broken:
                expect(dialog.get_by_role("alert")).to_contain_text("archive", timeout=START_TIMEOUT_MS)
                expect(dialog).to_contain_text("This kernel has no snapshots")
        expect(dialog.get_by_role("radio", name=re.compile("^as begun.*imported"))).to_be_checked(
            timeout=START_TIMEOUT_MS
        )
        dialog.get_by_role("button", name="Restore").click()
        expect(page.get_by_text("The kernel is as it was in “as begun”").first).to_be_visible(timeout=START_TIMEOUT_MS)
        notebook.run(1, expected="count is 1")
