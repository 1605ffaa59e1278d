"""A notebook in a browser, in the words of who uses it."""

import re
from dataclasses import dataclass

from playwright.sync_api import Locator, Page, expect

from tests.browser.lab import Lab

OPEN_TIMEOUT_MS = 60_000
START_TIMEOUT_MS = 60_000
CELL_TIMEOUT_MS = 60_000
CURRENT = re.compile("lm-mod-current")


@dataclass
class Notebook:
    """One open notebook of a page; which one, if there are several, can change."""

    page: Page
    name: str

    @classmethod
    def open(cls, page: Page, lab: Lab, name: str) -> "Notebook":
        """Open a notebook that lies in the server's folder."""
        page.goto(lab.page(name), timeout=OPEN_TIMEOUT_MS)
        page.get_by_role("tab", name=name).first.wait_for(timeout=OPEN_TIMEOUT_MS)
        return cls(page, name)

    def open_another(self, name: str) -> None:
        """Open another one beside it from the file browser; from now on this is that one."""
        self.page.locator(".jp-DirListing-item").filter(has_text=name).dblclick()
        self.show(name)

    def show(self, name: str) -> None:
        """Bring the tab of another open notebook to the front; from now on this is that one."""
        self.name = name
        self._tab.click(timeout=OPEN_TIMEOUT_MS)
        expect(self._tab).to_have_class(CURRENT)

    def reload(self, lab: Lab) -> None:
        """Load the page anew; JupyterLab opens what was open."""
        # Without the notebook's path, which has JupyterLab bring that one to the front when it sees fit.
        self.page.goto(f"{lab.url}/lab", timeout=OPEN_TIMEOUT_MS)
        self._tab.wait_for(timeout=OPEN_TIMEOUT_MS)
        self.page.locator("#jupyterlab-splash").wait_for(state="detached", timeout=OPEN_TIMEOUT_MS)

    @property
    def _tab(self) -> Locator:
        return self.page.locator(".lm-DockPanel-tabBar .lm-TabBar-tab").filter(has_text=self.name)

    @property
    def item(self) -> Locator:
        """What the toolbar says about the sandbox."""
        return self.page.get_by_role("toolbar").get_by_role("button", name=re.compile("^Sandbox: "))

    @property
    def alert(self) -> Locator:
        """The error that is explained below the toolbar."""
        return self.page.locator(".wc-Banner").get_by_role("alert")

    @property
    def status(self) -> Locator:
        """What is explained below the toolbar without being an error."""
        return self.page.locator(".wc-Banner").get_by_role("status")

    @property
    def dialog(self) -> Locator:
        """The picker, or whatever dialog is open."""
        return self.page.get_by_role("dialog")

    def wait_ready(self, label: str | re.Pattern[str] = re.compile(r"(template|cold start) · \d")) -> str:
        """Wait until a kernel runs in its sandbox; how the toolbar says so."""
        expect(self.item).to_contain_text(label, timeout=START_TIMEOUT_MS)
        return self.item.inner_text()

    def dismiss_start_error(self, message: str) -> None:
        """Wait for JupyterLab's own dialog about a failed start, and decline to choose another kernel."""
        told = self.dialog.filter(has_text="Error Starting Kernel")
        expect(told).to_contain_text(message, timeout=START_TIMEOUT_MS)
        told.get_by_role("button", name="Ok").click()
        self.dialog.filter(has_text="Select Kernel").get_by_role("button", name="No Kernel").click()

    def run(self, cell: int, *, expected: str) -> Locator:
        """Run a cell with Shift+Enter and wait for its output."""
        panel = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        # JupyterLab drops a cell that is run before it has its connection to the kernel.
        indicator = panel.locator(".jp-Notebook-ExecutionIndicator")
        expect(indicator).to_have_attribute("data-status", "idle", timeout=START_TIMEOUT_MS)
        code = panel.locator(".jp-Cell").nth(cell)
        code.locator(".jp-InputArea-editor").click()
        expect(self._tab).to_have_class(CURRENT)
        self.page.keyboard.press("Shift+Enter")
        output = code.locator(".jp-OutputArea-output")
        expect(output.first).to_contain_text(expected, timeout=CELL_TIMEOUT_MS)
        return output

    def restart(self) -> None:
        """Restart with the toolbar's button and confirm."""
        self.page.get_by_role("button", name="Restart the kernel").first.click()
        self.dialog.get_by_role("button", name="Confirm Kernel Restart").click()

    def kernel_menu(self, entry: str, *, exact: bool = False) -> None:
        """Choose an entry of the Kernel menu; `exact` where another's name has this one in it."""
        self.page.get_by_role("menuitem", name="Kernel", exact=True).click()
        self.page.get_by_role("menuitem", name=entry, exact=exact).click()

    def wait_shown(self) -> None:
        """Wait until it is open, and in front."""
        expect(self._tab).to_have_class(CURRENT, timeout=OPEN_TIMEOUT_MS)

    def pick(self) -> Locator:
        """Open the picker from the toolbar."""
        self.item.click()
        picker = self.dialog
        expect(picker.get_by_role("group", name="Runs on")).to_be_visible()
        return picker

    def apply(self) -> None:
        """Apply what the picker shows."""
        self.dialog.get_by_role("button", name="Apply this choice").click()
        expect(self.dialog).to_have_count(0)
