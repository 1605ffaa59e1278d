"""What everybody needs of the page: another language, the dark, axe's rules, and a keyboard that is never nowhere."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser import translated
from tests.browser.accessible import assert_accessible
from tests.browser.lab import Lab
from tests.browser.notebook import CELL_TIMEOUT_MS, START_TIMEOUT_MS
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap, pytest.mark.criu]

SIMULATED = [{"name": "A100-SXM4-80GB", "memory": "80GiB"}, {"name": "T4", "memory": "16GiB"}]
CELLS = ("count = 0\nprint('begun')", "count += 1\nprint('count is', count)")
SAID = (
    "This machine has",
    "Did you mean",
    r"\d of \d device is in use",
    "A100 is waited for no longer",
    "Ask again",
    "Restart the kernel",
)
"""How what the server says begins, which is English."""
DATA = "|".join(
    (
        *(f"{one}[^⟦]*" for one in SAID),
        *(r"[\w-]+\.ipynb", r"A100-SXM4-80GB|A100-80GB|A100|T4|H100", "[0-9a-z]{12}", r"/\S+", r"pypi\.org.*"),
        *("bubblewrap", "template", "plain", "default", "pandas"),
        *("Cancel", "Hide notification", "ein Name", r"vor \d+ \w+|jetzt"),  # JupyterLab's, and the user's.
    )
)
"""Names, what the server says, and what it calls things."""
WIDE = {"width": 1600, "height": 900}
"""Room for the whole toolbar."""

LIST = re.compile("^Running Terminals and Kernels")


class Abroad:
    """A page in another language."""

    def __init__(self, page: Page) -> None:
        self.page = page

    @property
    def item(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .wc-Item-button")

    @property
    def banner(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .wc-Banner")

    def row(self, name: str) -> Locator:
        return self.page.locator(".wc-Sandboxes-row").filter(has=self.page.get_by_text(name, exact=True))

    def action(self, name: str, action: str) -> Locator:
        return self.row(name).locator(f"[data-action={action}]")

    def check(self, *selectors: str) -> None:
        """Each is for everybody."""
        assert_accessible(self.page, *selectors)
        translated.assert_translated(self.page, *selectors, data=DATA)

    def run(self, cell: int, expected: str) -> None:
        panel = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        code = panel.locator(".jp-Cell").nth(cell)
        expect(panel.locator(".jp-Notebook-ExecutionIndicator")).to_have_attribute(
            "data-status", "idle", timeout=START_TIMEOUT_MS
        )
        code.locator(".jp-InputArea-editor").click()
        self.page.keyboard.press("Shift+Enter")
        expect(code.locator(".jp-OutputArea-output").first).to_contain_text(expected, timeout=CELL_TIMEOUT_MS)

    def kernel_menu(self, command: str) -> None:
        """Choose one of our entries."""
        self.page.get_by_role("menuitem", name="Kernel", exact=True).click()
        self.page.locator(f".lm-Menu-item[data-command='warmcell:{command}']").click()

    def decline(self) -> None:
        """JupyterLab tells of a failed start itself, and asks for another kernel."""
        told = self.page.get_by_role("dialog").filter(has_text="Error Starting Kernel")
        told.get_by_role("button", name="Ok").click(timeout=START_TIMEOUT_MS)
        self.page.get_by_role("dialog").filter(has_text="Select Kernel").get_by_role("button", name="No Kernel").click()

    def open(self, name: str) -> None:
        self.page.locator(".jp-DirListing-item").filter(has_text=name).dblclick()


@pytest.fixture(params=["JupyterLab Light", "JupyterLab Dark"])
def here(request: pytest.FixtureRequest, places: Places, page: Page) -> Iterator[Abroad]:
    """An open notebook on an A100 in that theme and another language."""
    folder = places.root / "language"
    with Lab(
        places, settings={"prepared": 0, "simulated_gpus": SIMULATED, "gpu_shares": 2}, env=translated.install(folder)
    ) as lab:
        lab.choose("@jupyterlab/apputils-extension:themes", {"theme": request.param})
        lab.choose("@jupyterlab/translation-extension:plugin", {"locale": translated.LOCALE})
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        for name, gpu in (("train.ipynb", "A100"), ("rival.ipynb", "A100"), ("lost.ipynb", "H100")):
            lab.notebook(name, *CELLS, kernel="plain", display_name="Plain", choice={"gpu": gpu})
        page.set_viewport_size(WIDE)
        page.goto(lab.page("train.ipynb"))
        made = Abroad(page)
        expect(made.item).to_contain_text(re.compile(r"A100-80GB · .* · \d"), timeout=START_TIMEOUT_MS)
        yield made


def test_every_part_in_every_state(here: Abroad) -> None:
    """Item, meters, list, picker, notices, snapshots and questions: translated, by axe's rules, with the keyboard."""
    page = here.page
    here.run(0, "begun")
    expect(page.locator(".wc-Meter-all")).to_be_visible(timeout=START_TIMEOUT_MS)
    here.open("rival.ipynb")
    expect(here.banner.locator(".wc-Notice")).to_be_visible(timeout=START_TIMEOUT_MS)
    page.get_by_role("tab", name=LIST).click()
    expect(here.row("rival.ipynb")).to_be_visible(timeout=START_TIMEOUT_MS)
    for name in ("train.ipynb", "rival.ipynb"):
        here.row(name).locator("summary").press("Enter")
    here.check(".wc-Item", ".wc-Meter", ".wc-Machine", ".wc-Sandboxes", ".wc-Banner")

    # The picker, which gives the keyboard back to where it was opened.
    here.item.press("Enter")
    picker = page.locator(".wc-Picker")
    picker.locator("input[name=wc-kind][value=T4]").check()
    picker.locator("input[name=wc-network][value=hosts]").check()
    here.check(".wc-Picker .jp-Dialog-body")
    page.keyboard.press("Escape")
    expect(here.item).to_be_focused()

    # Who waits no longer has another button, and no notice to cancel: the keyboard stays near.
    here.action("rival.ipynb", "cancel").press("Enter")
    here.decline()
    expect(here.row("rival.ipynb")).to_have_class(re.compile("wc-mod-failed"), timeout=START_TIMEOUT_MS)
    here.check(".wc-Item", ".wc-Sandboxes", ".wc-Banner")
    here.action("rival.ipynb", "stop").press("Enter")
    expect(here.row("rival.ipynb")).to_have_count(0, timeout=START_TIMEOUT_MS)
    expect(here.row("train.ipynb").locator("summary")).to_be_focused()

    page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab").filter(has_text="train.ipynb").click()
    here.action("train.ipynb", "park").press("Enter")
    expect(here.banner.locator(".wc-Notice")).to_be_visible(timeout=START_TIMEOUT_MS)
    expect(here.row("train.ipynb").locator("summary")).to_be_focused()
    here.check(".wc-Item", ".wc-Sandboxes", ".wc-Banner")
    here.banner.locator(".wc-Notice-close").press("Enter")
    expect(here.banner.locator(".wc-Notice")).to_have_count(0)
    assert page.evaluate("document.activeElement.closest('.jp-NotebookPanel') !== null")

    here.action("train.ipynb", "suspend").press("Enter")
    expect(here.action("train.ipynb", "resume")).to_be_visible(timeout=START_TIMEOUT_MS)
    expect(here.banner.locator(".wc-Notice")).to_be_visible(timeout=START_TIMEOUT_MS)
    here.check(".wc-Item", ".wc-Sandboxes", ".wc-Banner")
    here.run(1, "count is 1")
    here.check(".wc-Item", ".wc-Sandboxes")

    # Dialogs, of which each gives the keyboard back.
    save = here.action("train.ipynb", "snapshot")
    save.press("Enter")
    here.check(".jp-Dialog-content")
    page.keyboard.type("ein Name")
    page.keyboard.press("Enter")
    expect(page.locator(".Toastify__toast--success")).to_be_visible(timeout=START_TIMEOUT_MS)
    here.check(".Toastify__toast--success")
    expect(save).to_be_focused()
    here.action("train.ipynb", "port").press("Enter")
    here.check(".jp-Dialog-content")
    page.keyboard.press("Escape")
    expect(here.action("train.ipynb", "port")).to_be_focused()
    here.kernel_menu("restore-snapshot")
    dialog = page.locator(".wc-Snapshots")
    expect(dialog.get_by_role("radio")).to_be_focused(timeout=START_TIMEOUT_MS)
    here.check(".wc-Snapshots .jp-Dialog-content")
    page.keyboard.press("Enter")  # It takes a button to go back.
    dialog.locator(".wc-mod-rename").press("Enter")
    expect(dialog.locator(".wc-Snapshots-field")).to_be_focused()
    here.check(".wc-Snapshots .jp-Dialog-body")
    page.keyboard.press("Escape")
    dialog.locator(".wc-mod-remove").press("Enter")
    here.check(".wc-Snapshots .jp-Dialog-body")
    dialog.locator(".wc-Snapshots-sure").press("Enter")
    expect(dialog.get_by_role("radio")).to_have_count(0, timeout=START_TIMEOUT_MS)
    here.check(".wc-Snapshots .jp-Dialog-content")
    page.keyboard.press("Escape")


def test_what_is_not_here(here: Abroad) -> None:
    """A failed start, the menu, and the card of the launcher."""
    page = here.page
    here.open("lost.ipynb")
    here.decline()
    expect(here.banner.locator(".wc-Notice")).to_be_visible(timeout=START_TIMEOUT_MS)
    here.check(".wc-Banner", ".wc-Item")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    translated.assert_translated(page, ".lm-Menu-item[data-command^='warmcell:']")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_role("menuitem", name="New Launcher").click()
    card = page.locator(".jp-LauncherCard").filter(has_text="GPU")
    expect(card).to_be_visible()
    card.click()
    here.check(".wc-Picker .jp-Dialog-content")
