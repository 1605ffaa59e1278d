"""Open notebooks outlive their server and their keeper, in a real browser: same kernels, same variables."""

import json
import os
import re
import select
import signal
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.browser.lab import Lab
from tests.browser.notebook import Notebook
from tests.leaks import Places

pytestmark = [pytest.mark.browser, pytest.mark.bubblewrap, pytest.mark.criu]

CELLS = ("count = 0\nprint('begun')", "count += 1\nprint('count is', count)")
KEEPER_END_S = 60.0
LOSS_TIMEOUT_MS = 60_000
PRESENT = re.compile(r"suspended|(cold start|resumed) · \d")
"""What the toolbar says of a kernel that can be asked to run a cell."""


class Notebooks:
    """All open notebooks of a page, which count together."""

    def __init__(self, page: Page, lab: Lab, *, count: int) -> None:
        self._lab = lab
        self._names = [f"work{n}.ipynb" for n in range(count)]
        self._count = 0
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        for name in self._names:
            lab.notebook(name, *CELLS, kernel="plain", display_name="Plain")
        # JupyterLab explains in a dialog that its server is away, and goes on trying behind it.
        page.add_locator_handler(
            page.get_by_role("dialog").filter(has_text="Server Connection Error"),
            lambda dialog: dialog.get_by_role("button").last.click(),
        )
        self._one = Notebook.open(page, lab, self._names[0])
        for name in self._names:
            if name != self._one.name:
                self._one.open_another(name)
            self._one.wait_ready()
            self._one.run(0, expected="begun")
        self._sessions = lab.sessions()
        assert set(self._sessions) == set(self._names)

    def go_on(self) -> None:
        """Each has its variable, and its session and kernel are those of the beginning."""
        self._count += 1
        for name in self._names:
            self._one.show(name)
            self._one.wait_ready(PRESENT)
            self._one.run(1, expected=f"count is {self._count}")
        assert self._lab.sessions() == self._sessions

    def reload(self) -> None:
        """Load the page anew; JupyterLab opens again what was open."""
        self._one.reload(self._lab)

    @property
    def states(self) -> set[str]:
        """The states of their sandboxes."""
        states = self._lab.states()
        return {states[kernel_id] for _, kernel_id in self._sessions.values()}


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=[pytest.mark.long, pytest.mark.timeout(1200)])])
def test_open_notebooks_outlive_server_and_keeper(places: Places, page: Page, count: int) -> None:
    """Server stopped, server killed, keeper stopped; each with the tabs left open, and with a reload."""
    with Lab(places, settings={"prepared": 0}) as lab:
        notebooks = Notebooks(page, lab, count=count)

        def end_server(signum: int) -> None:
            lab.end(signum)
            lab.start()
            assert notebooks.states == {"suspended" if signum == signal.SIGTERM else "running"}

        ways: list[Callable[[], None]] = [
            lambda: end_server(signal.SIGTERM),
            lambda: end_server(signal.SIGKILL),
            lambda: end_keeper(places, signal.SIGTERM),
        ]
        for way in ways:
            way()
            notebooks.go_on()
            way()
            notebooks.reload()
            notebooks.go_on()


def end_keeper(places: Places, signum: int) -> None:
    """Send the keeper a signal of which it ends, and wait for that."""
    handle = os.pidfd_open(int(json.loads((places.runtime / "keeper.lock").read_text())["pid"]))
    try:
        signal.pidfd_send_signal(handle, signum)
        assert select.select([handle], [], [], KEEPER_END_S)[0]
    finally:
        os.close(handle)


def test_suspend_by_hand_and_a_loss_that_is_said(places: Places, page: Page) -> None:
    """The menu suspends, a reload wakes nothing, a cell does; a killed keeper's loss stands below the toolbar."""
    page.add_locator_handler(
        page.get_by_role("dialog").filter(has_text="Kernel Restarting"),
        lambda dialog: dialog.get_by_role("button").last.click(),
    )
    with Lab(places, settings={"prepared": 0}) as lab:
        lab.kernelspec("plain", "Plain", {"preload": [], "template": "plain"})
        lab.notebook("work.ipynb", *CELLS, kernel="plain", display_name="Plain")
        notebook = Notebook.open(page, lab, "work.ipynb")
        notebook.wait_ready()
        notebook.run(0, expected="begun")
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.get_by_role("menuitem", name="Suspend Kernel").click()
        notebook.wait_ready("CPU · suspended")
        notebook.reload(lab)
        notebook.wait_ready("CPU · suspended")
        assert set(lab.states().values()) == {"suspended"}
        notebook.run(1, expected="count is 1")
        notebook.wait_ready(re.compile(r"resumed · \d"))

        end_keeper(places, signal.SIGKILL)
        expect(notebook.status).to_contain_text("The kernel of this notebook is lost", timeout=LOSS_TIMEOUT_MS)
        expect(notebook.status).to_contain_text("without its variables")
        notebook.wait_ready()
        notebook.run(0, expected="begun")
